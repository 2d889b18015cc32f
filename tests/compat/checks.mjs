// What the scripts of clients for Node.js share, as checks.py does for those of Python.

export const [url, model] = process.argv.slice(2);
export const messages = [{ role: "user", content: "Rome has 22 degrees. Answer as JSON." }];
export const parameters = {
  type: "object",
  properties: { city: { enum: ["Rome", "Bern"] } },
  required: ["city"],
  additionalProperties: false,
};

export function check(condition, message) {
  if (!condition) throw new Error(message ?? "not as it should be");
}

export function isCity(found) {
  return ["Rome", "Bern"].includes(found.city);
}

// Tries each of the features, functions by their names; a line of JSON says what came of it.
export async function run(features) {
  let failed = false;
  for (const [feature, tryOut] of Object.entries(features)) {
    try {
      await tryOut();
      console.log(JSON.stringify({ feature, ok: true }));
    } catch (error) {
      failed = true;
      console.error(error);
      console.log(JSON.stringify({ feature, ok: false, error: String(error).slice(0, 1000) }));
    }
  }
  process.exit(failed ? 1 : 0);
}
