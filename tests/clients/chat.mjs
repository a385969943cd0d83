// The official JavaScript clients of OpenAI and Anthropic: chat, stream, stop, error, cancel.
// node chat.mjs URL

import assert from "node:assert/strict";

import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const url = process.argv[2];
const messages = [{ role: "user", content: "01 02" }];
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "user", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "user", maxRetries: 0 });

async function within(what, part) {
  await part();
  console.log(`${what}: fine`);
}

await within("openai (js), completions", async () => {
  const asked = { model: "digits", prompt: "01 02", max_tokens: 8, temperature: 0 };
  const whole = await openai.completions.create(asked);
  assert.equal(whole.choices[0].finish_reason, "length");
  let text = "";
  for await (const chunk of await openai.completions.create({ ...asked, stream: true })) text += chunk.choices[0].text;
  assert.equal(text, whole.choices[0].text);
});

await within("openai (js), chat", async () => {
  const asked = { model: "digits", messages, max_tokens: 8, temperature: 0 };
  const whole = await openai.chat.completions.create(asked);
  const said = whole.choices[0].message.content;
  const streamed = { text: "", reasons: [], usage: null };
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await openai.chat.completions.create({ ...asked, ...options })) {
    streamed.text += chunk.choices[0]?.delta.content ?? "";
    if (chunk.choices[0]?.finish_reason) streamed.reasons.push(chunk.choices[0].finish_reason);
    streamed.usage = chunk.usage ?? streamed.usage;
  }
  assert.equal(streamed.text, said);
  assert.deepEqual(streamed.reasons, ["length"]);
  assert.deepEqual(streamed.usage, whole.usage);
  const stop = said.slice(2, 4);
  const stopped = await openai.chat.completions.create({ ...asked, stop });
  assert.equal(stopped.choices[0].message.content, said.slice(0, said.indexOf(stop)));
  assert.equal(stopped.choices[0].finish_reason, "stop");
  await assert.rejects(openai.chat.completions.create({ ...asked, model: "nosuch" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.match(error.message, /there are auto, base, digits/);
    return true;
  });
  await assert.rejects(new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 }).models.list(), OpenAI.AuthenticationError);
  const names = (await openai.models.list()).data.map((card) => card.id);
  assert.ok(names.includes("digits"));
});

await within("openai (js), responses", async () => {
  const asked = { model: "digits", input: "01 02", max_output_tokens: 8, temperature: 0 };
  const whole = await openai.responses.create(asked);
  let text = "";
  let last = null;
  for await (const event of await openai.responses.create({ ...asked, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event;
  }
  assert.equal(text, whole.output_text);
  assert.match(last.type, /^response\.(completed|incomplete)$/);
  assert.equal((await openai.responses.stream(asked).finalResponse()).output_text, text);
});

await within("anthropic (js), messages", async () => {
  const asked = { model: "digits", messages, max_tokens: 8, temperature: 0 };
  const whole = await anthropic.messages.create(asked);
  assert.equal(whole.stop_reason, "max_tokens");
  const final = await anthropic.messages.stream(asked).finalMessage();
  assert.deepEqual(final.content, whole.content);
  const said = whole.content[0].text;
  const stopped = await anthropic.messages.create({ ...asked, stop_sequences: [said.slice(2, 4)] });
  assert.equal(stopped.stop_reason, "stop_sequence");
  const counted = await anthropic.messages.countTokens({ model: "digits", messages });
  assert.equal(counted.input_tokens, whole.usage.input_tokens);
  await assert.rejects(anthropic.messages.create({ ...asked, model: "nosuch" }), Anthropic.NotFoundError);
});

await within("openai and anthropic (js), cancelled", async () => {
  const asked = { model: "digits", messages, max_tokens: 180 };
  const stream = await openai.chat.completions.create({ ...asked, stream: true });
  for await (const _ of stream) break;
  const other = anthropic.messages.stream(asked);
  for await (const _ of other) break;
  const whole = openai.chat.completions.create(asked, { signal: AbortSignal.timeout(20) });
  await assert.rejects(whole, OpenAI.APIUserAbortError);
});
