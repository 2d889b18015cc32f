// LangChain for Node.js: node use_langchain_node.mjs URL MODEL
import { ChatOpenAI, OpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { check, isCity, messages, model, parameters, run, url } from "./checks.mjs";

const shared = { model, apiKey: "unused", configuration: { baseURL: `${url}/v1` }, maxRetries: 0, temperature: 0 };
const question = messages[0].content;

function chat(fields) {
  return new ChatOpenAI({ ...shared, maxTokens: 100, ...fields });
}

async function answers(fields) {
  const asked = chat({ ...fields, maxTokens: 16 });
  check((await asked.invoke(question)).text.length > 0);
  let text = "";
  for await (const part of await asked.stream(question)) text += part.text;
  check(text.length > 0);
}

await run({
  "invoke, stream": () => answers({}),
  "responses: invoke, stream": () => answers({ useResponsesApi: true }),
  bindTools: async () => {
    const weather = { type: "function", function: { name: "weather", parameters } };
    const bound = chat({}).bindTools([weather], { tool_choice: "weather" });
    check(isCity((await bound.invoke(question)).tool_calls[0].args));
  },
  "withStructuredOutput: jsonSchema, functionCalling": async () => {
    for (const method of ["jsonSchema", "functionCalling"]) {
      check(isCity(await chat({}).withStructuredOutput(parameters, { method, name: "city" }).invoke(question)));
    }
  },
  "completions, embeddings": async () => {
    check((await new OpenAI({ ...shared, maxTokens: 4 }).invoke("One")).length > 0);
    check((await new OpenAIEmbeddings(shared).embedQuery("One")).length > 8);
  },
});
