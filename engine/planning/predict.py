"""What a policy will achieve: steady sweep, finite job, peaks; decides nothing."""

from engine.planning.cost import peak_bytes
from engine.planning.job import simulate
from engine.planning.load import Load, kept_tokens, steady_load
from engine.planning.policy import Policy
from engine.planning.prediction import LANES, Prediction, SweepTerms
from engine.planning.roofline import Model
from engine.planning.sweep import Sweep
from engine.planning.workload import Workload


def running_rows(model: Model, policy: Policy, workload: Workload) -> float:
    """Rows that the block keeps running: as many as it may carry, the job has, and KV holds."""
    per_row = kept_tokens(workload, rows=1.0) - kept_tokens(workload, rows=0.0)
    room = policy.kv.total_bytes / model.shape.kv_bytes_per_token
    held = (room - kept_tokens(workload, rows=0.0)) / per_row
    return float(max(1.0, min(policy.block_rows, workload.num_rows, held)))


def steady(model: Model, policy: Policy, workload: Workload) -> tuple[Load, SweepTerms, float]:
    """Of one sweep in steady state: what it carries, its terms, its seconds."""
    rows = running_rows(model, policy, workload)
    load = steady_load(workload, rows=rows, sweep_tokens=policy.sweep_tokens)
    terms, sweep_s = Sweep(model, policy).timed(load, kept_tokens=kept_tokens(workload, rows=rows))
    return load, terms, sweep_s


def predict(model: Model, policy: Policy, workload: Workload) -> Prediction:
    """Raises HardwareError where the machine's description lacks a rate that the policy needs."""
    load, terms, sweep_s = steady(model, policy, workload)
    rows = running_rows(model, policy, workload)
    sweep = Sweep(model, policy)
    per_row = kept_tokens(workload, rows=rows) / rows
    job = simulate(
        workload,
        block_rows=int(rows),
        sweep_tokens=policy.sweep_tokens,
        seconds=lambda each: sweep.seconds(each, kept_tokens=max(1.0, each.rows) * per_row),
        steady_tokens_per_s=load.rows / sweep_s,
    )
    lane, term = binding(terms)
    return Prediction(
        terms=terms,
        overlap=policy.overlap,
        sweep_s=sweep_s,
        sweep_tokens=load.rows,
        prompt_tokens=load.prompt_tokens,
        num_rows=rows,
        tokens_per_s=load.rows / sweep_s,
        job_s=job.job_s,
        job_tokens_per_s=job.num_tokens / job.job_s,
        startup_s=job.startup_s,
        tail_s=job.tail_s,
        # Little's law: rows that are in the block, over rows that leave it a second.
        latency_s=rows * workload.mean_output_tokens * sweep_s / load.rows,
        binding_lane=lane,
        binding_term=term,
        peak_bytes=peak_bytes(model.shape, policy),
    )


def binding(terms: SweepTerms) -> tuple[str, str]:
    """The slowest lane, and the largest term in it."""
    seconds = terms.as_dict()
    lane = max(LANES, key=lambda each: sum(seconds[name] for name in LANES[each]))
    return lane, max(LANES[lane], key=lambda name: seconds[name])
