// The flow that users copy, with the official Node client: `node flow.mjs http://host:port`.
// Runs where only that client is installed. Prints one line at the end, or throws.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

import OpenAI, { toFile } from "openai";

const FINAL = ["completed", "failed", "expired", "cancelled"];
const ENDPOINT = "/v1/chat/completions";

async function main(url) {
  let numRequests = 0;
  const counted = (...given) => {
    numRequests += 1;
    return fetch(...given);
  };
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", fetch: counted });
  const models = await all(client.models.list());
  const model = models[0].id;
  assert.equal((await client.models.retrieve(model)).id, model);
  await uploaded(client, model);
  await inParts(client, model);
  await completed(client, model);
  await refused(client, model);
  await cancelled(client, model);
  await paged(client);
  await unknown(client);
  await conflicting(client, () => numRequests);
  const { version } = JSON.parse(
    await readFile(new URL("node_modules/openai/package.json", import.meta.url)),
  );
  console.log(`openai for Node ${version}: all well`);
}

async function all(pages) {
  const found = [];
  for await (const item of pages) found.push(item);
  return found;
}

function lines(model, maxTokens) {
  return maxTokens
    .map((limit, index) => {
      const messages = [{ role: "user", content: `Größe ${index} 😀` }];
      const body = { model, messages, max_tokens: limit };
      return `${JSON.stringify({ custom_id: `c-${index}`, method: "POST", url: ENDPOINT, body })}\n`;
    })
    .join("");
}

async function submitted(client, text) {
  const file = await client.files.create({ file: await toFile(Buffer.from(text), "in.jsonl"), purpose: "batch" });
  return created(client, file.id);
}

function created(client, fileId) {
  return client.batches.create({
    input_file_id: fileId,
    endpoint: ENDPOINT,
    completion_window: "24h",
    metadata: { job: "flow" },
  });
}

async function ended(client, batch) {
  while (!FINAL.includes(batch.status)) {
    await sleep(20);
    batch = await client.batches.retrieve(batch.id);
  }
  return batch;
}

async function rows(client, fileId) {
  const answer = await client.files.content(fileId);
  const text = await answer.text();
  return text.trimEnd().split("\n").map((line) => JSON.parse(line));
}

async function uploaded(client, model) {
  const text = lines(model, [1]);
  const folder = await mkdtemp(join(tmpdir(), "flow-"));
  try {
    const path = join(folder, "Größe.jsonl");
    await writeFile(path, text);
    const file = await client.files.create({ file: createReadStream(path), purpose: "batch" });
    assert.equal(file.filename, "Größe.jsonl");
    assert.equal(file.bytes, Buffer.byteLength(text));
    assert.deepEqual(await client.files.retrieve(file.id), file);
    assert.equal(await (await client.files.content(file.id)).text(), text);
    assert.equal((await client.files.delete(file.id)).deleted, true);
    await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
  } finally {
    await rm(folder, { recursive: true });
  }
}

async function inParts(client, model) {
  const whole = Buffer.from(lines(model, [1, 1]));
  const halves = [whole.subarray(0, 100), whole.subarray(100)];
  const upload = await client.uploads.create({
    bytes: whole.length,
    filename: "parts.jsonl",
    mime_type: "application/jsonl",
    purpose: "batch",
  });
  assert.equal(upload.status, "pending");
  const parts = [];
  for (const half of halves) {
    parts.push(await client.uploads.parts.create(upload.id, { data: await toFile(half, "part") }));
  }
  const done = await client.uploads.complete(upload.id, {
    part_ids: parts.map((part) => part.id),
    md5: createHash("md5").update(whole).digest("hex"),
  });
  assert.equal(done.status, "completed");
  const batch = await ended(client, await created(client, done.file.id));
  assert.equal(batch.request_counts.completed, 2);
}

async function completed(client, model) {
  const batch = await ended(client, await submitted(client, lines(model, [1, 2, 3])));
  assert.deepEqual([batch.status, batch.error_file_id], ["completed", null]);
  assert.deepEqual(batch.request_counts, { total: 3, completed: 3, failed: 0 });
  assert.deepEqual(batch.metadata, { job: "flow" });
  const found = await rows(client, batch.output_file_id);
  assert.deepEqual(found.map((row) => row.custom_id), ["c-0", "c-1", "c-2"]);
  for (const [index, row] of found.entries()) {
    assert.deepEqual([row.error, row.response.status_code], [null, 200]);
    const completion = row.response.body;
    assert.equal(completion.object, "chat.completion");
    assert.equal(typeof completion.choices[0].message.content, "string");
    assert.equal(completion.usage.completion_tokens, index + 1);
  }
}

async function refused(client, model) {
  let batch = await ended(client, await submitted(client, lines(model, [-1, -1])));
  assert.deepEqual([batch.status, batch.output_file_id], ["completed", null]);
  const found = await rows(client, batch.error_file_id);
  assert.deepEqual(found.map((row) => row.response.status_code), [400, 400]);
  batch = await ended(client, await submitted(client, `${lines(model, [1])}oops\n`));
  assert.equal(batch.status, "failed");
  assert.deepEqual([batch.errors.data[0].code, batch.errors.data[0].line], ["invalid_json_line", 2]);
}

async function cancelled(client, model) {
  let batch = await submitted(client, lines(model, [1, 200, 200]));
  while (batch.request_counts.completed === 0) batch = await client.batches.retrieve(batch.id);
  batch = await ended(client, await client.batches.cancel(batch.id));
  assert.equal(batch.status, "cancelled");
  assert.deepEqual((await rows(client, batch.output_file_id)).map((row) => row.custom_id), ["c-0"]);
  const codes = (await rows(client, batch.error_file_id)).map((row) => row.error.code);
  assert.deepEqual(codes, ["batch_cancelled", "batch_cancelled"]);
}

async function paged(client) {
  const batches = (await all(client.batches.list({ limit: 2 }))).map((batch) => batch.id);
  assert.ok(batches.length >= 4 && new Set(batches).size === batches.length);
  for (const order of ["asc", "desc"]) {
    const files = (await all(client.files.list({ limit: 3, order }))).map((file) => file.id);
    assert.ok(files.length >= 4 && new Set(files).size === files.length);
  }
}

async function unknown(client) {
  for (const ask of [
    () => client.files.retrieve("file-none"),
    () => client.files.content("file-none"),
    () => client.batches.retrieve("batch_none"),
    () => client.batches.cancel("batch_none"),
    () => client.uploads.cancel("upload_none"),
  ]) {
    await assert.rejects(ask, (error) => {
      assert.ok(error instanceof OpenAI.NotFoundError);
      assert.deepEqual([error.status, error.type, error.param], [404, "invalid_request_error", "id"]);
      assert.match(error.requestID, /^req_/);
      return true;
    });
  }
  await assert.rejects(client.models.retrieve("none/such"), { status: 404, code: "model_not_found" });
  const nothing = client.files.create({ file: await toFile(Buffer.from("")), purpose: "batch" });
  await assert.rejects(nothing, OpenAI.BadRequestError);
}

async function conflicting(client, numRequests) {
  const ended = (await all(client.batches.list())).find((batch) => batch.status === "completed");
  const before = numRequests();
  await assert.rejects(client.batches.cancel(ended.id), OpenAI.ConflictError);
  assert.equal(numRequests(), before + 1, "a conflict was tried again");
}

await main(process.argv[2]);
