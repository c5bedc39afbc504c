import pytest
import torch

from engine.compute.logprobs import score


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
def test_scores_are_those_of_log_softmax(scale: float) -> None:
    logits = scale * torch.randn(4, 7000, generator=torch.Generator().manual_seed(1))
    token_ids = torch.tensor([0, 6999, 17, 4000])
    before = logits.clone()
    scores = score(logits, token_ids, num_top=6)
    assert torch.equal(logits, before)
    expected = logits.double().log_softmax(dim=-1)
    torch.testing.assert_close(
        scores[:, 0], expected.gather(1, token_ids[:, None])[:, 0], atol=1e-6, rtol=0
    )
    values, tokens = expected.topk(6)
    assert torch.equal(scores[:, 1:7].long(), tokens)
    torch.testing.assert_close(scores[:, 7:], values, atol=1e-6, rtol=0)


def test_among_equals_the_lower_id_comes_first_whatever_their_sign() -> None:
    logits = torch.tensor([[-1.0, 0.0, -0.0, 2.0, -1.0, 2.0, -3.0]])
    scores = score(logits, torch.tensor([3]), num_top=7)
    assert scores[0, 1:8].tolist() == [3, 5, 1, 2, 0, 4, 6]


def test_without_likeliest_tokens_only_the_chosen_one_is_scored() -> None:
    scores = score(torch.zeros(2, 4), torch.tensor([1, 2]), num_top=0)
    assert scores.tolist() == [[pytest.approx(-1.3862943611)]] * 2
