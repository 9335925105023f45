// Compares Spindle's chat templates with npm @huggingface/jinja: every template of templates/ for
// every conversation. (jinja2_oracle.py compares the details of the language; this package renders
// values by the rules of JavaScript where Python's differ.)
//
// usage: node jinja_oracle.mjs DRIVER

import { readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { Driver, importOrSkip } from "./driver.mjs";

const { Template } = await importOrSkip("@huggingface/jinja");

const here = dirname(fileURLToPath(import.meta.url));
const conversations = JSON.parse(readFileSync(join(here, "conversations.json"), "utf8"));
// assorted.jinja prints loops, None and floats, and uses tags that the package does not know.
const templates = readdirSync(join(here, "templates"))
  .filter((name) => name.endsWith(".jinja") && name !== "assorted.jinja").sort();

// Where the package differs from Jinja2, and Spindle follows Jinja2: an attribute of the undefined
// messages[0] of an empty conversation is an error, and its filters for lists are not complete.
const isKnown = (index, reason) =>
  conversations[index].messages.length === 0 || /^Unknown ArrayValue filter/.test(reason ?? "");

const driver = new Driver(process.argv[2]);
let same = 0;
let known = 0;
const failures = [];
for (const name of templates) {
  const source = readFileSync(join(here, "templates", name), "utf8");
  for (const [index, conversation] of conversations.entries()) {
    const context = {
      bos_token: "<s>", eos_token: "</s>", date_string: "26 Jul 2024", ...conversation,
    };
    let expected;
    let reason;
    try {
      expected = new Template(source).render(context);
    } catch (error) {
      reason = error.message;
    }
    const reply = await driver.ask({ op: "render", template: source, context });
    if (reply.text === expected) {
      ++same;
    } else if (isKnown(index, reason)) {
      ++known;
    } else {
      failures.push(`${name} #${index}\n  jinja:   ${JSON.stringify(expected) ?? reason}\n  spindle: ${JSON.stringify(reply.text) ?? reply.error}`);
    }
  }
}
driver.end();
for (const failure of failures) console.log(failure);
console.log(`${same} the same, ${known} known differences, ${failures.length} failures`);
process.exitCode = failures.length > 0 || same === 0 ? 1 : 0;
