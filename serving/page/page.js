// The page asks the service as any client may: teacher and student of a task, one after the other, each timed.
"use strict";

const element = id => document.getElementById(id);
const tasks = new Map();  // name -> {teacher, student}, either may be missing

async function call(path, body) {
  const options = body && {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)};
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error || response.statusText);
  return answer;
}

function make(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;  // never HTML: a text may hold anything
  return made;
}

async function listTasks() {
  const {adapters, students} = await call("/v1/adapters");
  for (const {name} of adapters) tasks.set(name, {teacher: name});
  for (const {name, teacher} of students) {
    const task = teacher === null ? name : teacher;
    tasks.set(task, {...tasks.get(task), student: name});
  }
  for (const name of tasks.keys()) {
    const option = make("option", "", name);
    option.value = name;
    element("task").append(option);
  }
}

function show(section, name, result, milliseconds) {
  const heading = section.querySelector("h2");
  section.replaceChildren(heading, make("p", "verdict", result.name ?? result.label),
    make("p", "time", `${(100 * result.probability).toFixed(1)} % in ${milliseconds.toFixed(1)} ms (${name})`));
  if (result.truncated) section.append(make("p", "time", "Too long: only a part of the sentence was read."));
  const classes = make("dl", "classes", "");
  for (const [label, probability] of Object.entries(result.probabilities)) {
    const bar = document.createElement("meter");
    bar.value = probability;
    const middle = make("dd", "", "");
    middle.append(bar);
    classes.append(make("dt", "", label), middle, make("dd", "", probability.toFixed(3)));
  }
  section.append(classes);
  section.hidden = false;
}

async function ask(kind, name, text) {
  const section = element(kind);
  section.hidden = true;
  if (!name) return;
  const start = performance.now();
  const answer = await call("/v1/classify", {[kind === "teacher" ? "adapter" : "student"]: name, texts: [text]});
  show(section, name, answer.results[0], performance.now() - start);
}

async function classify(event) {
  event.preventDefault();
  const {teacher, student} = tasks.get(element("task").value), text = element("text").value;
  element("error").hidden = true;
  element("ask").disabled = true;
  try {
    await ask("teacher", teacher, text);  // one after the other, so that neither waits for the other's turn
    await ask("student", student, text);
  } catch (error) {
    fail(error);
  } finally {
    element("ask").disabled = false;
  }
}

function fail(error) {
  element("error").textContent = error.message;
  element("error").hidden = false;
}

element("question").addEventListener("submit", classify);
listTasks().catch(fail);
