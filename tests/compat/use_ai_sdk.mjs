// Vercel's AI SDK, with its four ways to speak to a server: node use_ai_sdk.mjs URL MODEL
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { check, isCity, messages, model, parameters, run, url } from "./checks.mjs";

const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const compatible = createOpenAICompatible({
  name: "slipstream", baseURL: `${url}/v1`, apiKey: "unused", includeUsage: true, supportsStructuredOutputs: true,
});
const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "unused" });
const models = {
  "openai, chat": openai.chat(model), "openai, responses": openai(model),
  "openai-compatible": compatible(model), anthropic: anthropic(model),
};
const schema = jsonSchema(parameters);
const tools = { weather: tool({ description: "The weather of a city.", inputSchema: schema }) };

const features = {};
for (const [name, each] of Object.entries(models)) {
  const asked = { model: each, messages, maxRetries: 0, temperature: 0 };
  features[`${name}: text, streamed, structured, tools`] = async () => {
    const whole = await generateText({ ...asked, maxOutputTokens: 12 });
    const stream = streamText({ ...asked, maxOutputTokens: 12 });
    let text = "";
    for await (const part of stream.textStream) text += part;
    check(text.length > 0 && text === whole.text);
    check((await stream.usage).outputTokens > 0);
    check(isCity((await generateObject({ ...asked, schema, maxOutputTokens: 100 })).object));
    const calling = { ...asked, tools, toolChoice: { type: "tool", toolName: "weather" }, maxOutputTokens: 100 };
    check(isCity((await generateText(calling)).toolCalls[0].input));
    const [call] = await streamText(calling).toolCalls;
    check(isCity(call.input));
  };
}
features["completions, embeddings"] = async () => {
  const asked = { model: compatible.completionModel(model), prompt: "One", maxOutputTokens: 4, maxRetries: 0 };
  check((await generateText(asked)).text.length > 0);
  const found = await embed({ model: compatible.embeddingModel(model), value: "One", maxRetries: 0 });
  check(found.embedding.length > 8);
};
await run(features);
