// The OpenAI client for Node.js: node use_openai_node.mjs URL MODEL
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "Rome has 22 degrees. Answer as JSON." }];
const parameters = {
  type: "object",
  properties: { city: { enum: ["Rome", "Bern"] } },
  required: ["city"],
  additionalProperties: false,
};

function check(condition, message) {
  if (!condition) throw new Error(message ?? "not as it should be");
}

const features = {
  "chat, streamed": async () => {
    const whole = await client.chat.completions.create({ model, messages, max_tokens: 12, temperature: 0 });
    const stream = client.chat.completions.stream({ model, messages, max_tokens: 12, temperature: 0 });
    check((await stream.finalContent()) === whole.choices[0].message.content);
  },
  "structured output": async () => {
    const response_format = { type: "json_schema", json_schema: { name: "city", schema: parameters, strict: true } };
    const found = await client.chat.completions.parse({ model, messages, max_tokens: 100, response_format });
    check(["Rome", "Bern"].includes(found.choices[0].message.parsed.city));
  },
  "tools, streamed": async () => {
    const tools = [{ type: "function", function: { name: "weather", parameters, strict: true } }];
    const asked = { model, messages, max_tokens: 200, tools, tool_choice: "required", parallel_tool_calls: false };
    const final = await client.chat.completions.stream(asked).finalChatCompletion();
    const [call] = final.choices[0].message.tool_calls;
    check(["Rome", "Bern"].includes(JSON.parse(call.function.arguments).city));
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
};

let failed = false;
for (const [feature, run] of Object.entries(features)) {
  try {
    await run();
    console.log(JSON.stringify({ feature, ok: true }));
  } catch (error) {
    failed = true;
    console.error(error);
    console.log(JSON.stringify({ feature, ok: false, error: String(error).slice(0, 1000) }));
  }
}
process.exit(failed ? 1 : 0);
