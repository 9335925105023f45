// Compares Spindle's tokenizer with npm @huggingface/tokenizers.
//
// usage: node tokenizers_oracle.mjs DRIVER MODEL_FOLDER [SEED]
// The bundled tokenizer.json is tried as it is and with other pre-tokenizers, normalisers, added
// tokens and post-processors, on fixed and random texts.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Driver, importOrSkip, seededRandom } from "./driver.mjs";

const { Tokenizer } = await importOrSkip("@huggingface/tokenizers");

const [driverPath, modelFolder, seedText] = process.argv.slice(2);
const seed = seedText ? Number(seedText) : Math.floor(Math.random() * 2 ** 32);
const random = seededRandom(seed);
const bundled = JSON.parse(readFileSync(join(modelFolder, "tokenizer.json"), "utf8"));

const byteLevel = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false };
const split = (Regex, behavior = "Isolated", invert = false) => ({
  type: "Split", pattern: { Regex }, behavior, invert,
});
const sequence = (...pretokenizers) => ({ type: "Sequence", pretokenizers });

const LLAMA3 =
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const O200K = [
  "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
  "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
  "\\p{N}{1,3}", " ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*", "\\s*[\\r\\n]+", "\\s+(?!\\S)", "\\s+",
].join("|");
const added = (id, content, flags = {}) => ({
  id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true,
  ...flags,
});

// Changes to the bundled file, by name.
const variants = {
  bundled: {},
  "GPT-2 pattern": { pre_tokenizer: { ...byteLevel, use_regex: true } },
  "GPT-2 pattern with prefix space": {
    pre_tokenizer: { ...byteLevel, use_regex: true, add_prefix_space: true },
  },
  "Llama-3 pattern": { pre_tokenizer: sequence(split(LLAMA3), byteLevel) },
  "o200k pattern": { pre_tokenizer: sequence(split(O200K), byteLevel) },
  "removed white space": { pre_tokenizer: sequence(split("\\s+", "Removed"), byteLevel) },
  "kept words only": { pre_tokenizer: sequence(split("\\w+|[^\\w\\s]+", "Removed", true), byteLevel) },
  "word boundaries": { pre_tokenizer: sequence(split("\\b\\w{1,2}+\\b", "Isolated"), byteLevel) },
  "line anchors": { pre_tokenizer: sequence(split("^\\s*\\S|\\S$", "Isolated"), byteLevel) },
  digits: {
    pre_tokenizer: sequence({ type: "Digits", individual_digits: true }, split(LLAMA3), byteLevel),
  },
  "digit runs": { pre_tokenizer: sequence({ type: "Digits", individual_digits: false }, byteLevel) },
  "no split": { pre_tokenizer: byteLevel },
  NFC: { normalizer: { type: "NFC" } },
  "NFC in a sequence": { normalizer: { type: "Sequence", normalizers: [{ type: "NFC" }] } },
  "ignore_merges": { model: { ...bundled.model, ignore_merges: true } },
  "string merges": {
    model: { ...bundled.model, merges: bundled.model.merges.map((pair) => pair.join(" ")) },
  },
  "more added tokens": {
    added_tokens: [
      ...bundled.added_tokens, added(4096, "<l>", { lstrip: true }), added(4097, "<r>", { rstrip: true }),
      added(4098, "<a>"), added(4099, "<a>>"), added(4100, "  ", { special: false }),
    ],
  },
  "template processing": {
    post_processor: {
      type: "TemplateProcessing",
      single: [
        { SpecialToken: { id: "<|im_start|>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } },
        { SpecialToken: { id: "<|im_end|>", type_id: 0 } },
      ],
      pair: [],
      special_tokens: {
        "<|im_start|>": { id: "<|im_start|>", ids: [1], tokens: ["<|im_start|>"] },
        "<|im_end|>": { id: "<|im_end|>", ids: [2], tokens: ["<|im_end|>"] },
      },
    },
  },
};

const FIXED = [
  "", " ", "\n", "Hello, world!", "It's 12345 o'clock; isn't it? I'VE we'll", "a  b   c    \n\n  d\r\n e",
  "naïve café — “quoted” … ½ ² ³x", "日本語のテキスト 한국어 עברית हिन्दी", "🙂👩‍👩‍👧‍👦 é e\u0301 \u1112\u1161\u11ab",
  "x=1;y=[2,3]\n\tif(x){return y;}", "<|im_start|>user\nhi<|im_end|>\n", "<s><l> <l>a <r> b<a><a>>  <a  >", "ＡＢＣ１２３ ﬁ ß ſ 'ſ 'S",
  "\u00a0\u2003\u3000\u0085x", "camelCaseWords HTTPServer don'T", "1234567890123 1,000.50", "tail   ",
];
// Characters that all Unicode versions in use agree on.
const ALPHABET = [
  ..." \n\t\r'.,;:!?-_()[]{}<>/\\|@#$%^&*+=~`\"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
  ..."    \n\n''sstdm<<>>||", ..."éüñßøžčĀ½²³¼ªµ·ʰ", ..."αβγДжщעבتجहिन्दी한국日本語ーは",
  ..."\u0301\u0308\u200d\ufe0f🙂👩🇫🇷\u00a0\u2003\u3000\u2028“”…€№Ⅳ①",
];
const randomText = () =>
  Array.from({ length: random(60) }, () => ALPHABET[random(ALPHABET.length)]).join("");

const driver = new Driver(driverPath);
let same = 0;
const failures = [];
for (const [name, changes] of Object.entries(variants)) {
  const json = { ...bundled, ...changes };
  const oracle = new Tokenizer(json, {});
  const loaded = await driver.ask({ op: "tokenizer", json });
  if (loaded.error) {
    failures.push(`${name}: ${loaded.error}`);
    continue;
  }
  for (const anyText of [...FIXED, ...Array.from({ length: 150 }, randomText)]) {
    // The package's Digits knows ASCII digits only; the Rust library, which Spindle follows, takes
    // every numeric character.
    const text = name.startsWith("digit") ? anyText.replace(/(?![0-9])\p{N}/gu, "") : anyText;
    const expected = oracle.encode(text, { add_special_tokens: true }).ids;
    const reply = await driver.ask({ op: "encode", text, add_special_tokens: true });
    if (JSON.stringify(reply.ids) !== JSON.stringify(expected)) {
      failures.push(
        `${name}: ${JSON.stringify(text)}\n  tokenizers: ${expected}\n  spindle:    ${reply.ids ?? reply.error}`);
      continue;
    }
    const decoded = await driver.ask({ op: "decode", ids: expected, skip_special: false });
    const expectedText = expected.length === 0 ? "" : oracle.decode(expected, {
      skip_special_tokens: false, clean_up_tokenization_spaces: false,
    });
    if (decoded.text === expectedText) {
      ++same;
    } else {
      failures.push(`${name}: decode ${expected}\n  tokenizers: ${JSON.stringify(expectedText)}\n  spindle:    ${JSON.stringify(decoded.text)}`);
    }
  }
}
driver.end();
console.log(`seed ${seed}`);
for (const failure of failures.slice(0, 40)) console.log(failure);
console.log(`${same} the same, ${failures.length} failures`);
process.exitCode = failures.length > 0 || same === 0 ? 1 : 0;
