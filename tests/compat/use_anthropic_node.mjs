// The Anthropic client for Node.js: node use_anthropic_node.mjs URL MODEL
import Anthropic from "@anthropic-ai/sdk";
import { check, isCity, messages, model, parameters, run, url } from "./checks.mjs";

const client = new Anthropic({ baseURL: url, apiKey: "unused", maxRetries: 0 });
const asked = { model, messages, max_tokens: 12, temperature: 0 };

await run({
  "messages, streamed": async () => {
    const whole = await client.messages.create(asked);
    const text = await client.messages.stream(asked).finalText();
    check(text.length > 0 && text === whole.content[0].text);
  },
  "tools, streamed": async () => {
    const tools = [{ name: "weather", input_schema: parameters }];
    const stream = client.messages.stream({ ...asked, max_tokens: 100, tools, tool_choice: { type: "tool", name: "weather" } });
    let said = "";
    stream.on("inputJson", (part) => (said += part));
    const [call] = (await stream.finalMessage()).content;
    check(call.type === "tool_use" && isCity(call.input) && isCity(JSON.parse(said)));
  },
  count_tokens: async () => {
    check((await client.messages.countTokens({ model, messages })).input_tokens > 0);
  },
  batches: async () => {
    const requests = [{ custom_id: "one", params: asked }];
    let batch = await client.messages.batches.create({ requests });
    while (batch.processing_status !== "ended") {
      await new Promise((resolve) => setTimeout(resolve, 200));
      batch = await client.messages.batches.retrieve(batch.id);
    }
    for await (const { result } of await client.messages.batches.results(batch.id)) check(result.type === "succeeded");
    check(batch.request_counts.succeeded === 1);
  },
});
