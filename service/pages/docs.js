// The API page: the routes of /openapi.json as a person reads them. Nothing comes from elsewhere, so it works without a network.

const VERBS = ["get", "post", "put", "delete", "patch"];
const DEEPEST = 5; // schemas may hold themselves

const $ = (id) => document.getElementById(id);

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Text with `code` in backticks, as nodes. */
function prose(text) {
  return (text ?? "").split("`").map((part, at) => (at % 2 ? make("code", "", part) : part.replaceAll("\n", " ")));
}

function paragraphs(text) {
  return (text ?? "").split(/\n\s*\n/).filter(Boolean).map((part) => make("p", "", ...prose(part)));
}

function resolve(document, schema) {
  return schema?.$ref ? schema.$ref.slice(2).split("/").reduce((place, key) => place[key], document) : (schema ?? {});
}

/** "array of string", "number, 0 to 1, default 0.5" */
function kindOf(document, given) {
  const schema = resolve(document, given);
  const options = (schema.anyOf ?? schema.oneOf ?? []).filter(({ type }) => type !== "null");
  if (options.length) return [...new Set(options.map((option) => kindOf(document, option)))].join(" or ") + defaultOf(schema);
  const name = schema.enum ? schema.enum.join(" | ") : (schema.title && schema.properties ? schema.title : schema.type ?? "any");
  const items = schema.type === "array" ? ` of ${kindOf(document, schema.items)}` : "";
  const [low, high] = [schema.minimum ?? schema.exclusiveMinimum, schema.maximum ?? schema.exclusiveMaximum];
  const range = low !== undefined && high !== undefined ? `, ${low} to ${high}` : low !== undefined ? `, from ${low}` : high !== undefined ? `, up to ${high}` : "";
  const coded = schema.format === "binary" ? "file" : schema.contentEncoding;
  return `${coded ?? name}${items}${range}${defaultOf(schema)}`;
}

function defaultOf(schema) {
  return schema.default === undefined || schema.default === null || schema.default.length === 0 ? "" : `, default ${schema.default}`;
}

/** A made-up value of the schema's shape, so that a reader sees the JSON. */
function exampleOf(document, given, depth = 0) {
  const schema = resolve(document, given);
  if (schema.example !== undefined) return schema.example;
  if (schema.examples?.length) return schema.examples[0];
  if (schema.default !== undefined && schema.default !== null) return schema.default;
  const option = (schema.anyOf ?? schema.oneOf ?? schema.allOf)?.[0];
  if (option) return exampleOf(document, option, depth);
  if (schema.enum) return schema.enum[0];
  if (depth > DEEPEST) return null;
  if (schema.type === "array") return [exampleOf(document, schema.items, depth + 1)];
  if (schema.properties) {
    return Object.fromEntries(Object.entries(schema.properties).map(([name, field]) => [name, exampleOf(document, field, depth + 1)]));
  }
  return { integer: 0, number: 0.0, boolean: false, object: {}, string: schema.format === "binary" ? "(bytes)" : "string" }[schema.type] ?? null;
}

function scrolling(title, table) {
  const place = make("div", "fields", table);
  place.tabIndex = 0;
  place.setAttribute("role", "group");
  place.setAttribute("aria-label", title);
  return place;
}

function fieldTable(title, rows) {
  const body = rows.map(([name, kind, text]) => {
    const head = make("th", "", make("code", "", name));
    head.scope = "row";
    return make("tr", "", head, make("td", "kind", kind), make("td", "text", ...prose(text)));
  });
  return scrolling(title, make("table", "", make("tbody", "", ...body)));
}

function section(title, rows) {
  return rows.length ? [make("h3", "", title), fieldTable(title, rows)] : [];
}

function folded(title, ...children) {
  return make("details", "", make("summary", "", title), ...children);
}

function parametersOf(document, operation) {
  return (operation.parameters ?? []).map((given) => resolve(document, given));
}

function optionRows(document, operation) {
  return parametersOf(document, operation).map((one) => [
    one.name, `${one.in === "query" ? "" : `in the ${one.in}, `}${kindOf(document, one.schema)}`, one.description ?? one.schema?.description,
  ]);
}

/** One row a type of body; fields that are options too are not told twice. */
function bodyRows(document, operation) {
  const options = new Set(parametersOf(document, operation).map(({ name }) => name));
  return Object.entries(resolve(document, operation.requestBody).content ?? {}).map(([type, { schema }]) => {
    const { properties, description } = resolve(document, schema);
    const own = Object.entries(properties ?? {}).filter(([name]) => !options.has(name));
    const fields = own.map(([name, field]) => `\`${name}\`: ${kindOf(document, field)}`).join(", ");
    const also = own.length && own.length < Object.keys(properties).length ? ", and the options above" : "";
    return [type, fields ? "object" : kindOf(document, schema), fields ? fields + also : description];
  });
}

function answersOf(document, operation) {
  const all = Object.entries(operation.responses ?? {}).map(([status, given]) => ({ status, ...resolve(document, given) }));
  return [all.filter(({ status }) => status < "4"), all.filter(({ status }) => status >= "4")];
}

function exampleBlock(document, [first]) {
  const media = first?.content?.["application/json"];
  const example = media?.example ?? (media?.schema && Object.keys(media.schema).length ? exampleOf(document, media.schema) : null);
  if (example === null || example === undefined) return [];
  const shown = make("pre", "", JSON.stringify(example, null, 2));
  shown.tabIndex = 0;
  return [folded("An answer", shown)];
}

/** The codes of a status, told by its examples. */
function errorRow({ status, content, description }) {
  const examples = Object.entries(Object.values(content ?? {})[0]?.examples ?? {});
  return [status, examples.map(([code]) => code).join(", "), examples.map(([, { summary }]) => summary).join(", ") || description];
}

function answerBlocks(document, operation) {
  const [good, bad] = answersOf(document, operation);
  const rows = good.map(({ status, content, description }) => [status, Object.keys(content ?? {}).join(", "), description]);
  const errors = bad.length ? [folded("Errors", fieldTable("Errors", bad.map(errorRow)))] : [];
  return [...section("Answer", rows), ...exampleBlock(document, good), ...errors];
}

/** Where the service asks for keys, and always for what changes it. */
function keyNote(operation) {
  const needed = operation.security?.length && operation.security.every((choice) => Object.keys(choice).length);
  return needed ? make("p", "muted", operation.tags?.includes("admin") ? "Needs an admin key." : "Needs a key.") : null;
}

function operationCard(document, path, verb, operation) {
  const card = make(
    "section", "card operation",
    make("h2", "", make("span", "verb", verb.toUpperCase()), path),
    operation.summary ? make("p", "", make("b", "", operation.summary)) : null,
    ...paragraphs(operation.description),
    keyNote(operation),
    ...section("Options", optionRows(document, operation)),
    ...section("Body", bodyRows(document, operation)),
    ...answerBlocks(document, operation),
  );
  card.id = `${verb}${path.replace(/\W+/g, "-")}`;
  return card;
}

function show(document) {
  $("title").textContent = `${document.info.title} ${document.info.version}`;
  $("about").append(...prose(document.info.description));
  const groups = new Map();
  for (const [path, verbs] of Object.entries(document.paths)) {
    for (const verb of VERBS.filter((one) => one in verbs)) {
      const card = operationCard(document, path, verb, verbs[verb]);
      const link = make("a", "", path);
      link.href = `docs#${card.id}`;
      const tag = verbs[verb].tags?.[0] ?? "Routes";
      groups.set(tag, [...(groups.get(tag) ?? []), [link, card]]);
    }
  }
  for (const [tag, pairs] of groups) {
    $("contents").append(make("h2", "", tag), ...pairs.map(([link]) => link));
    $("operations").append(...pairs.map(([, card]) => card));
  }
}

try {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`/openapi.json answered ${response.status}`);
  show(await response.json());
} catch (error) {
  $("notice-place").append(make("p", "notice", `The description of the API could not be read: ${error.message}.`));
}
