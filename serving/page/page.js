// The page asks the service as any client may: teacher and student of a task, one after the other, each timed.
"use strict";

const MOST_TEXTS = 64, MOST_CHARACTERS = 200000;  // of a request: far below the service's limits
const KINDS = ["teacher", "student"];
const element = id => document.getElementById(id);
const tasks = new Map();  // name -> {teacher, student, pairs}, either model may be missing; pairs: a text is two texts
const shownNames = new Map();  // model's name -> Map from a class to the name that is shown
let current = null;  // the AbortController of the question under way

// ---------------------------------------------------------------- the service

async function call(path, body, signal) {
  const options = body && {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal};
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  }
  // A proxy before the service may answer with a page of its own.
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    const message = answer.error || `The server answers with an error (${response.status}).`;
    throw Object.assign(new Error(message), {status: response.status});
  }
  return answer;
}

async function listTasks() {
  const {adapters, students} = await call("/v1/adapters");
  const chosen = element("task").value;
  tasks.clear();
  for (const {name, pairs} of adapters) tasks.set(name, {teacher: name, pairs});
  for (const {name, teacher, pairs} of students) {
    const task = teacher === null ? name : teacher;
    tasks.set(task, {...tasks.get(task), student: name, pairs});
  }
  for (const {name, classes, class_names: names} of [...adapters, ...students]) {
    shownNames.set(name, new Map(classes.map((label, place) => [label, names?.[place] ?? label])));
  }
  element("task").replaceChildren(...[...tasks.keys()].map(name => new Option(name, name)));
  if (tasks.has(chosen)) element("task").value = chosen;
  showFields();
}

// The second text has a field where the chosen task is one of pairs.
const readsPairs = () => Boolean(tasks.get(element("task").value)?.pairs);
function showFields() {
  element("pair").hidden = !readsPairs();
  document.querySelector("label[for=text]").textContent = readsPairs() ? "First text" : "Text";
}

// A text as the service takes it: the two of a pair have a tab between them, and none within the first.
const sent = ({text, second}) => second === undefined ? text : `${text.replaceAll("\t", " ")}\t${second}`;

// Groups of items that fit into one request each.
function* requests(items) {
  let group = [], characters = 0;
  for (const item of items) {
    if (group.length === MOST_TEXTS || group.length && characters + sent(item).length > MOST_CHARACTERS) {
      yield group;
      [group, characters] = [[], 0];
    }
    group.push(item);
    characters += sent(item).length;
  }
  yield group;
}

// The results of a model for all items, and its milliseconds.
async function classify(kind, name, items, signal, progress) {
  const results = [], start = performance.now();
  for (const group of requests(items)) {
    try {
      const body = {[kind === "teacher" ? "adapter" : "student"]: name, texts: group.map(sent)};
      results.push(...(await call("/v1/classify", body, signal)).results);
    } catch (error) {
      if (signal.aborted) throw error;
      // The service counts the texts of a request; the reader counts lines.
      const where = place => group[place]?.line ? `Line ${group[place].line}: ` : "";
      throw Object.assign(error, {message: error.message.replace(/^texts\.(\d+): /, (_, place) => where(place))});
    }
    progress(results.length);
  }
  return {name, results, milliseconds: performance.now() - start};
}

// ---------------------------------------------------------------- what is shown

function make(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;  // never HTML: a text may hold anything
  return made;
}

const percent = probability => `${(100 * probability).toFixed(1)} %`;

function verdict(result) {
  const label = result.name ?? result.label;
  return Array.isArray(label) ? label.join(", ") || "none" : String(label);
}

function notes(result) {
  const found = [];
  if (result.truncated) found.push("Too long: only a part of the text was read.");
  if (result.unknown_words) found.push(`The model never saw: ${result.unknown_words.join(", ")}.`);
  return found;
}

// Nothing of an earlier question stays: it would stand under another task, or under an error.
function clear() {
  current?.abort();
  current = null;
  for (const id of ["answers", "batch", ...KINDS]) element(id).hidden = true;
  for (const id of ["error", "status"]) element(id).textContent = "";
  for (const id of ["text", "second"]) element(id).removeAttribute("aria-invalid");
  element("ask").removeAttribute("aria-busy");
  URL.revokeObjectURL(element("download").href);
  element("download").removeAttribute("href");
}

function fail(error) {
  clear();
  const {message} = error;
  element("error").textContent = message[0].toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}

function showAnswer(kind, {name, results: [result], milliseconds}) {
  const section = element(kind);
  const measured = `${result.probability === undefined ? "" : percent(result.probability) + " "}in ${milliseconds.toFixed(1)} ms (${name})`;
  section.replaceChildren(section.querySelector("h2"), make("p", "verdict", verdict(result)), make("p", "time", measured),
    ...notes(result).map(note => make("p", "mark", note)));
  const classes = make("dl", "classes", "");
  for (const [label, probability] of Object.entries(result.probabilities ?? {})) {
    const bar = document.createElement("meter"), middle = make("dd", "", ""), shown = shownNames.get(name)?.get(label) ?? label;
    bar.value = probability;
    bar.setAttribute("aria-label", shown);
    middle.append(bar);
    classes.append(make("dt", "", shown), middle, make("dd", "", probability.toFixed(3)));
  }
  section.append(classes);
  section.hidden = false;
}

// A batch as rows of strings, the first with the columns' names.
function rowsOf(items, answers) {
  const second = items[0].second === undefined ? [] : ["second text"];
  const header = ["line", "text", ...second, ...Object.keys(answers).flatMap(kind => [kind, `${kind}'s probability`]), "note"];
  return [header, ...items.map((item, place) => {
    const results = Object.values(answers).map(answer => answer.results[place]);
    return [String(item.line), item.text, ...second.map(() => item.second), ...results.flatMap(result => [verdict(result), result.probability?.toFixed(4) ?? ""]),
      [...new Set(results.flatMap(notes))].join(" ")];
  })];
}

// The same rows as a table; it has no column of notes: each stands under its text.
function showBatch(rows) {
  const [header, ...body] = rows;
  const row = (tag, cells, note) => {
    const made = make("tr", "", "");
    made.append(...cells.map((cell, column) => {
      const isNumber = header[column] === "line" || header[column].endsWith("probability");
      const made = make(tag, header[column].endsWith("text") ? "text" : isNumber ? "number" : "", cell);
      if (tag === "th") made.scope = "col";
      if (note && header[column] === "text") made.append(make("div", "mark", note));
      return made;
    }));
    return made;
  };
  element("batch").querySelector("thead").replaceChildren(row("th", header.slice(0, -1)));
  element("batch").querySelector("tbody").replaceChildren(...body.map(cells => row("td", cells.slice(0, -1), cells.at(-1))));
  element("download").href = URL.createObjectURL(new Blob([csv(rows)], {type: "text/csv;charset=utf-8"}));
  element("batch").hidden = false;
}

// RFC 4180: a cell with a comma, a quote or a line break stands in quotes, and a quote in it twice.
function csv(rows) {
  const cell = text => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  return rows.map(row => row.map(cell).join(",") + "\r\n").join("");
}

// ---------------------------------------------------------------- a question

// The texts to classify: the whole of the field, or each line that is not blank with its number. Of pairs, line by line.
function items() {
  const parts = id => element("lines").checked ? element(id).value.split(/\r?\n/) : [element(id).value];
  const first = parts("text"), second = readsPairs() ? parts("second") : [];
  const count = Math.max(first.length, second.length);
  const found = Array.from({length: count}, (_, place) => ({line: element("lines").checked ? place + 1 : undefined,
    text: first[place] ?? "", second: readsPairs() ? second[place] ?? "" : undefined}));
  return found.filter(item => item.text.trim() || item.second?.trim());
}

async function ask(event) {
  event.preventDefault();
  clear();
  const asked = items(), batch = element("lines").checked;
  // Half of a pair would be answered too.
  for (const [id, part, words] of [["text", "text", "text"], ["second", "second", "second text"]]) {
    const lacking = asked.find(item => item[part] !== undefined && !item[part].trim());
    if (lacking || !asked.length) {
      fail(new Error(lacking?.line ? `Line ${lacking.line}: the ${words} is empty.` : `The ${words} is empty.`));
      return element(id).setAttribute("aria-invalid", "true");
    }
  }
  const {signal} = current = new AbortController();
  element("ask").setAttribute("aria-busy", "true");  // not disabled: a disabled button loses the focus
  try {
    if (!tasks.size) await listTasks();
    const task = tasks.get(element("task").value);
    if (!task) throw new Error("The server has no model to ask.");
    const answers = {};
    for (const kind of KINDS.filter(kind => task[kind])) {  // one after the other: neither waits for the other's turn
      answers[kind] = await classify(kind, task[kind], asked, signal, done => {
        element("status").textContent = batch ? `${kind}: ${done} of ${asked.length} lines` : "";
      });
      if (!batch) showAnswer(kind, answers[kind]);
      element("asked").textContent = [asked[0].text, asked[0].second].filter(text => text !== undefined).join("\n");
      element("answers").hidden = batch;
    }
    if (batch) showBatch(rowsOf(asked, answers));
    element("status").textContent = Object.entries(answers).map(([kind, {results, milliseconds}]) =>
      batch ? `${kind}: ${results.length} lines in ${milliseconds.toFixed(0)} ms` : `${kind}: ${verdict(results[0])}`).join("; ");
    element("ask").removeAttribute("aria-busy");
  } catch (error) {
    if (signal.aborted) return;  // another question has taken its place
    fail(error);
    if (error.status === 404) listTasks().catch(fail);  // a model has come or gone since the list was made
  }
}

element("question").addEventListener("submit", ask);
element("task").addEventListener("change", clear);
element("task").addEventListener("change", showFields);
element("lines").addEventListener("change", clear);
for (const id of ["text", "second"]) {
  element(id).addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("question").requestSubmit();
  });
}
listTasks().catch(fail);
