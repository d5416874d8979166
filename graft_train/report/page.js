"use strict";
// The page: its plots, the switch between light and dark, and the viewer of rounds. Data are only ever set as text.

const read = (id) => JSON.parse(document.getElementById(id).textContent);

function element(name, classes, text, ...children) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function switchTheme() {
  const root = document.documentElement;
  const isDark = getComputedStyle(root).colorScheme === "dark" ||
    (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = isDark ? "light" : "dark";
}

// Colours are the style sheet's, so that a plot need not be drawn again when they change.
const axis = { labelColor: "var(--muted)", titleColor: "var(--muted)", gridColor: "var(--line)", domainColor: "var(--line)",
  tickColor: "var(--line)", tickCount: 6, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400, gridDash: [2, 3] };
const config = { background: "transparent", font: "system-ui, sans-serif", view: { stroke: null }, axis };

function draw() {
  const specs = read("plots");
  for (const place of document.querySelectorAll(".plot"))
    vegaEmbed(place, specs[place.dataset.plot], { renderer: "svg", actions: false, ast: true, config });
}

// What cannot be seen is shown: spaces at the ends, line ends, and a token that is a part of a character.
const visible = (text) =>
  text === "" ? "▫" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣");
const percent = (thousandths) => (thousandths > 0 && thousandths < 10 ? "<1 %" : `${Math.round(thousandths / 10)} %`);
const total = (ms) => Object.values(ms).reduce((sum, one) => sum + one, 0);
const PHASES = { draft: "draft", graft: "look up, choose", verify: "verify", commit: "accept, keep" };

class Viewer {
  constructor(data) {
    Object.assign(this, data);
    this.names = Object.keys(this.methods);
    this.method = this.names[0];
    this.only = new Set();
    for (const id of ["answer", "sources", "rejected", "matches", "prompt", "tokens", "round"])
      this[`$${id}`] = document.getElementById(id);
    this.answers.forEach((answer, index) => {
      const begin = answer.tokens.map(([piece]) => piece).join("").trim().slice(0, 48);
      const option = element("option", "", `${index + 1}: ${begin}…`);
      option.value = index;
      this.$answer.append(option);
    });
    for (const [name, hue] of Object.entries(this.hues)) {
      if (name === "target") {
        this.$sources.append(element("span", `chip ${hue}`, name));
        continue;
      }
      const chip = element("button", `chip ${hue}`, name);
      chip.type = "button";
      chip.ariaPressed = "false";
      chip.addEventListener("click", () => this.filterBy(name, chip));
      this.$sources.append(chip);
    }
    this.$answer.addEventListener("change", () => this.open(Number(this.$answer.value)));
    this.$rejected.addEventListener("change", () => this.filter());
    this.$tokens.addEventListener("click", (event) => this.click(event));
    for (const place of [this.$tokens, this.$round]) place.addEventListener("keydown", (event) => this.key(event));
    this.open(0);
  }

  open(index) {
    this.shown = this.answers[index];
    this.$prompt.textContent = this.shown.prompt;
    this.spans = this.shown.tokens.map(([piece, source, round]) => {
      const span = element("span", `token ${this.hues[source]}`, piece.replaceAll("\n", "⏎\n") || "▫");
      span.title = source;
      if (round === null) {
        span.classList.add("prefill");
        span.title = "the target's own, read from the prompt";
      } else {
        span.dataset.round = round;
        span.role = "button";
        span.tabIndex = -1;
      }
      return span;
    });
    this.$tokens.replaceChildren(...this.spans);
    this.filter();
  }

  filterBy(name, chip) {
    if (!this.only.delete(name)) this.only.add(name);
    chip.ariaPressed = String(this.only.has(name));
    this.filter();
  }

  // A round matches if a chosen source had a token accepted in it, or if none had, where that is asked.
  filter() {
    const sources = this.shown.rounds.map(() => new Set());
    for (const [, source, round] of this.shown.tokens) if (round !== null) sources[round].add(source);
    const isWanted = (found) =>
      (!this.only.size || [...this.only].some((name) => found.has(name))) &&
      (!this.$rejected.checked || [...found].every((name) => name === "target"));
    this.matching = sources.flatMap((found, round) => (isWanted(found) ? [round] : []));
    for (const span of this.spans)
      span.classList.toggle("dim", span.dataset.round !== undefined && !this.matching.includes(Number(span.dataset.round)));
    this.$matches.textContent = `${this.matching.length} of ${this.shown.rounds.length} rounds`;
    this.choose(this.matching.includes(this.current) ? this.current : this.matching[0]);
  }

  choose(round, focus = false) {
    this.current = round;
    for (const span of this.spans) {
      const isChosen = round !== undefined && span.dataset.round === String(round);
      span.classList.toggle("chosen", isChosen);
      if (span.role) {
        span.tabIndex = -1;
        span.ariaPressed = String(isChosen);
      }
    }
    const first = this.spans.find((span) => span.classList.contains("chosen"));
    if (first) first.tabIndex = 0;
    if (first && focus) first.focus();
    this.render();
  }

  step(by, focus) {
    const place = this.matching.indexOf(this.current) + by;
    if (this.matching[place] !== undefined) this.choose(this.matching[place], focus);
  }

  click(event) {
    const round = event.target.dataset?.round;
    if (round === undefined) return;
    this.choose(Number(round), true);
    this.$round.scrollIntoView({ block: "nearest" });
  }

  key(event) {
    const isText = event.currentTarget === this.$tokens;
    if (event.target.classList.contains("tree") && event.key.startsWith("Arrow")) return; // it scrolls
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: -this.matching.indexOf(this.current),
      End: this.matching.length - 1 - this.matching.indexOf(this.current) };
    if (event.key in moves) this.step(moves[event.key], isText);
    else if (this.names[event.key - 1]) this.show(this.names[event.key - 1]);
    else if (isText && (event.key === "Enter" || event.key === " ")) this.click(event);
    else return;
    event.preventDefault();
  }

  show(method) {
    this.method = method;
    this.render();
  }

  render() {
    const round = this.shown.rounds[this.current];
    if (!round) {
      this.$round.replaceChildren(element("p", "", "No round is as asked."));
      return;
    }
    const made = round.made[this.method];
    const kept = this.$round.contains(document.activeElement) && document.activeElement.dataset.keep;
    const words = element("p", "words", `${this.method} ${this.methods[this.method].words}.`);
    this.$round.replaceChildren(this.bar(round), this.buttons(round), element("p", "why", made.why), ...times(made.ms),
      this.tree(round, made), element("p", "words", this.legend(made)), words);
    if (kept) this.$round.querySelector(`[data-keep="${kept}"]`).focus();
  }

  bar(round) {
    const heading = element("h3", "", `Round ${this.current + 1} of ${this.shown.rounds.length}, after “${visible(round.root)}”`);
    const steps = element("span");
    for (const [text, name, by] of [["←", "the round before", -1], ["→", "the round after", 1]]) {
      const button = element("button", "page", text);
      button.type = "button";
      button.ariaLabel = name;
      button.dataset.keep = name;
      button.disabled = this.matching[this.matching.indexOf(this.current) + by] === undefined;
      button.addEventListener("click", () => this.step(by, false));
      steps.append(button, " ");
    }
    return element("div", "bar", undefined, heading, steps);
  }

  // What each method's plan makes of this root.
  buttons(round) {
    const row = element("div", "methods");
    for (const name of this.names) {
      const { emitted, ms } = round.made[name];
      const button = element("button", "", undefined, element("b", "", name),
        element("small", "", `${emitted} token${emitted > 1 ? "s" : ""}, ${total(ms).toFixed(1)} ms`),
        element("small", "", `${((1000 * emitted) / total(ms)).toFixed(0)} tokens/s`));
      button.type = "button";
      button.dataset.keep = button.dataset.method = name;
      button.ariaPressed = String(name === this.method);
      button.addEventListener("click", () => this.show(name));
      row.append(button);
    }
    return row;
  }

  // From left to right; behind the accepted nodes stands the token that the target added.
  tree(round, made) {
    const root = element("li", "", undefined, element("span", "node accepted default", visible(round.root)));
    const items = [root];
    const below = (item) => item.querySelector(":scope > ul") || item.appendChild(element("ul"));
    let last = root;
    for (const [text, parent, source, score, isAccepted] of made.nodes) {
      const node = element("span", `node ${this.hues[source]}`, visible(text), element("small", "", percent(score)));
      node.title = `${source}, ${percent(score)}${isAccepted ? ", accepted" : ""}`;
      node.classList.toggle("accepted", Boolean(isAccepted));
      const item = element("li", "", undefined, node);
      items.push(item);
      below(items[parent]).append(item);
      if (isAccepted) last = item;
    }
    const accepted = made.nodes.filter((node) => node[4]).length;
    if (made.emitted > accepted) {
      const [piece] = this.shown.tokens[round.place + made.emitted] || [""];
      const node = element("span", `node accepted ${this.hues.target}`, visible(piece), element("small", "", "target"));
      below(last).prepend(element("li", "", undefined, node));
    }
    const tree = element("div", "tree", undefined, element("ul", "", undefined, root));
    tree.tabIndex = 0;
    tree.dataset.keep = "tree";
    tree.role = "region";
    tree.ariaLabel = "The tree";
    return tree;
  }

  legend(made) {
    if (!made.nodes.length) return "Nothing is proposed: the target adds its token alone.";
    const score = this.methods[this.method].scored ? "P(accepted), by which the nodes compete" : "what the proposer gives the path";
    const accepted = made.nodes.filter((node) => node[4]).length;
    return `${made.nodes.length} proposed nodes, ${accepted} accepted (bold). Percent: ${score}.`;
  }
}

function times(ms) {
  const parts = Object.entries(ms).map(([phase, time]) => {
    const part = element("i", phase);
    part.style.width = `${(100 * time) / total(ms)}%`;
    return part;
  });
  const names = Object.entries(ms).map(([phase, time]) => element("span", phase, `${PHASES[phase]} ${time.toFixed(2)} ms`));
  return [element("div", "phases", undefined, ...parts), element("div", "legend", undefined, ...names)];
}

document.getElementById("theme").addEventListener("click", switchTheme);
if (document.getElementById("viewer")) new Viewer(read("rounds-data"));
draw();
