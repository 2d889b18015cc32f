// The OpenAI client for Node.js: node use_openai_node.mjs URL MODEL
import OpenAI from "openai";
import { check, isCity, messages, model, parameters, run, url } from "./checks.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });

await run({
  "chat, streamed": async () => {
    const whole = await client.chat.completions.create({ model, messages, max_tokens: 12, temperature: 0 });
    const stream = client.chat.completions.stream({ model, messages, max_tokens: 12, temperature: 0 });
    check((await stream.finalContent()) === whole.choices[0].message.content);
  },
  "structured output": async () => {
    const response_format = { type: "json_schema", json_schema: { name: "city", schema: parameters, strict: true } };
    const found = await client.chat.completions.parse({ model, messages, max_tokens: 100, response_format });
    check(isCity(found.choices[0].message.parsed));
  },
  "tools, streamed": async () => {
    const tools = [{ type: "function", function: { name: "weather", parameters, strict: true } }];
    const asked = { model, messages, max_tokens: 200, tools, tool_choice: "required", parallel_tool_calls: false };
    const final = await client.chat.completions.stream(asked).finalChatCompletion();
    const [call] = final.choices[0].message.tool_calls;
    check(isCity(JSON.parse(call.function.arguments)));
  },
  "responses, streamed, tools": async () => {
    const tools = [{ type: "function", name: "weather", parameters, strict: true }];
    const asked = { model, input: messages[0].content, max_output_tokens: 200, tools, tool_choice: "required" };
    const final = await client.responses.stream({ ...asked, parallel_tool_calls: false }).finalResponse();
    check(final.output[0].type === "function_call");
    const text = await client.responses.create({ model, input: "Hello", max_output_tokens: 8 });
    check(text.output_text.length > 0);
  },
  embeddings: async () => {
    const found = await client.embeddings.create({ model, input: ["One", "Two"] });
    check(found.data.length === 2 && found.data[0].embedding.length > 8);
  },
});
