"use strict";

const UNITS = [[2 ** 30, "GiB", 2], [2 ** 20, "MiB", 1], [1, "KiB", 1]];

/* Bytes as the rest of the page writes them. */
function bytesText(value) {
  const [size, name, digits] = UNITS.find(([size]) => value >= size) || UNITS[2];
  return (value / (name === "KiB" ? 1024 : size)).toFixed(digits) + " " + name;
}

function element(kind, style, text) {
  const made = document.createElement(kind);
  made.className = style;
  made.textContent = text || "";
  return made;
}

/* The path down to the next name below depth; a number belongs to the name in front of it. */
function childOf(path, depth) {
  const names = path ? path.split(".") : [];
  if (names.length <= depth) return null;
  let end = depth + 1;
  while (end < names.length && /^\d+$/.test(names[end])) end += 1;
  return names.slice(0, end).join(".");
}

function commonPath(paths) {
  let common = paths[0].split(".");
  for (const path of paths) {
    const names = path.split(".");
    common = common.filter((name, at) => common.slice(0, at + 1).every((n, k) => names[k] === n));
  }
  return common.join(".");
}

/* One entry a call: {path, rows, group}; a loop has all of its rows. */
function stepsOf(outline) {
  const steps = [];
  for (const [name, operator, module, result, group] of outline.rows) {
    const row = { name, operator: outline.operators[operator], path: outline.modules[module], result: outline.results[result] };
    const last = steps[steps.length - 1];
    if (group >= 0 && last && last.group === group) last.rows.push(row);
    else steps.push({ path: row.path, rows: [row], group });
  }
  for (const step of steps) if (step.group >= 0) step.path = commonPath(step.rows.map((row) => row.path));
  return steps;
}

/* A part of the tree that is filled when it is first opened. */
function folded(parent, style, label, count, fill) {
  const details = element("details", style);
  const summary = element("summary", "", label + " ");
  summary.append(element("span", "count", count));
  details.append(summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) fill(details);
  });
  parent.append(details);
}

function operatorLine(parent, row) {
  const line = element("div", "operator");
  line.append(element("code", "", row.operator), " ", element("span", "size", row.result[0] + ", " + bytesText(row.result[1])));
  line.title = row.name;
  parent.append(line);
}

function loopOf(parent, step, plan) {
  const group = plan.groups[step.group];
  const axes = group.axes.map((axis) => axis.size + "/" + axis.chunk).join(" × ");
  const trips = group.axes.reduce((count, axis) => count * Math.ceil(axis.size / axis.chunk), 1);
  const held = bytesText(group.whole_bytes) + " → " + bytesText(group.peak_bytes);
  folded(parent, "loop", "loop " + step.group + ": " + trips + " trips over " + axes, step.rows.length + " operators, " + held, (inside) =>
    fill(inside, step.rows.map((row) => ({ path: row.path, rows: [row], group: -1 })), 0, plan));
}

/* The steps below one module: runs of the same child are folded, the module's own operators and loops are lines. */
function fill(parent, steps, depth, plan) {
  for (let at = 0; at < steps.length; ) {
    const child = childOf(steps[at].path, depth);
    if (child === null) {
      if (steps[at].group >= 0) loopOf(parent, steps[at], plan);
      else operatorLine(parent, steps[at].rows[0]);
      at += 1;
      continue;
    }
    let end = at;
    while (end < steps.length && childOf(steps[end].path, depth) === child) end += 1;
    const run = steps.slice(at, end);
    const operators = run.reduce((count, step) => count + step.rows.length, 0);
    const loops = run.filter((step) => step.group >= 0).length;
    const count = operators + (operators === 1 ? " operator" : " operators") + (loops ? ", " + loops + (loops === 1 ? " loop" : " loops") : "");
    folded(parent, "module", child, count, (inside) => fill(inside, run, child.split(".").length, plan));
    at = end;
  }
}

function at(values, share) {
  return Math.min(values.length - 1, Math.floor(share * values.length));
}

function moduleAt(bands, place) {
  let found = "";
  for (const [module, start] of bands) if (start <= place) found = module;
  return found ? " in " + found : "";
}

/* What both timelines hold where the pointer is. */
function probe(section, plan) {
  const drawing = section.querySelector(".timeline svg");
  const said = section.querySelector(".probe");
  const calls = stepsOf(plan.after);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const told = [Math.round(100 * share) + " %"];
    if (plan.eager_timeline.length) {
      const place = at(plan.eager_timeline, share);
      told.push("eager " + bytesText(plan.eager_timeline[place]) + moduleAt(plan.eager_bands, place));
    }
    if (plan.timeline.length) {
      const place = at(plan.timeline, share);
      const step = calls[place];
      const where = step ? (step.group >= 0 ? ", loop " + step.group : "") + (step.path ? " in " + step.path : "") : "";
      told.push("optimized " + bytesText(plan.timeline[place] + plan.beside_bytes) + where);
    }
    said.textContent = told.join("; ");
  });
}

function save(text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "plan.json";
  link.click();
}

for (const section of document.querySelectorAll("section[data-plan]")) {
  const text = document.getElementById(section.dataset.plan).textContent;
  const plan = JSON.parse(text);
  for (const tree of section.querySelectorAll(".tree")) fill(tree, stepsOf(plan[tree.dataset.graph]), 0, plan);
  section.querySelector(".save").addEventListener("click", () => save(text));
  probe(section, plan);
}
