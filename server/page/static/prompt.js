// A prompt, answered side by side by the base and by adapters, token by token.

import { stream } from "./api.js";
import { byId, make, say, write } from "./dom.js";
import { count, NONE, rate, seconds } from "./format.js";

const MAX_TARGETS = 5; // browsers open six connections to a server; one is for the rest of the page

/** The panel of a prompt. */
export class Prompt {
  constructor() {
    this.base = null;
    this.hasTemplate = false;
    this.adapters = new Map();
    this.targets = [];
    this.running = null;
    byId("try-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        byId("try-form").requestSubmit();
      }
    });
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("target-add").addEventListener("click", () => this.addTyped());
    byId("target-name").addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        event.preventDefault();
        this.addTyped();
      }
    });
  }

  /** Take the base and the adapters that the server has now. */
  show(server, adapters) {
    if (this.base === null) {
      this.targets.unshift(server.base);
    }
    this.base = server.base;
    this.hasTemplate = server.has_chat_template;
    const loaded = adapters.filter((adapter) => adapter.state === "loaded");
    const names = loaded.map((adapter) => adapter.name).join("\n");
    this.adapters = new Map(loaded.map((adapter) => [adapter.name, adapter]));
    if (names !== this.names) {
      this.names = names;
      const options = loaded.map(({ name }) => make("option", { value: name }));
      byId("target-names").replaceChildren(...options);
      this.drawTargets();
    }
  }

  addTyped() {
    const input = byId("target-name");
    const name = input.value.trim();
    if (name !== "" && this.add(name)) {
      input.value = "";
    }
    input.focus();
  }

  /** Add a target; false, with a reason said, where that cannot be. */
  add(name) {
    const result = byId("try-result");
    if (name !== this.base && !this.adapters.has(name)) {
      say(result, `${name} is not loaded.`, "bad");
      return false;
    }
    if (!this.targets.includes(name) && this.targets.length >= MAX_TARGETS) {
      say(result, `At most ${MAX_TARGETS} answer side by side; take one away first.`, "bad");
      return false;
    }
    if (!this.targets.includes(name)) {
      this.targets.push(name);
      this.drawTargets();
    }
    say(result, `${name} will answer.`);
    return true;
  }

  remove(name) {
    this.targets = this.targets.filter((target) => target !== name);
    this.drawTargets();
    byId("target-name").focus();
  }

  drawTargets() {
    const chips = this.targets.map((name) => {
      const isGone = name !== this.base && !this.adapters.has(name);
      const remove = make("button", { type: "button", "aria-label": `Take away ${name}` }, "×");
      remove.addEventListener("click", () => this.remove(name));
      const what = name === this.base ? "base " : "";
      const label = make("span", { class: "target-name" }, name, isGone ? " (not loaded)" : "");
      return make("li", {}, make("span", { class: "quiet" }, what), label, remove);
    });
    byId("targets").replaceChildren(...chips);
  }

  async run() {
    const result = byId("try-result");
    if (this.running !== null) {
      return;
    }
    if (this.targets.length === 0) {
      say(result, "Nobody is to answer: add the base or an adapter.", "bad");
      return;
    }
    const running = new AbortController();
    this.running = running;
    byId("run").disabled = true;
    byId("stop").disabled = false;
    say(result, "Running …");
    const columns = this.targets.map((name) => new Answer(name, name === this.base));
    byId("answers").replaceChildren(...columns.map((column) => column.element));
    const ends = await Promise.all(
      columns.map((column) => column.run(...this.call(column.name), running.signal)),
    );
    this.running = null;
    byId("run").disabled = false;
    byId("stop").disabled = true;
    say(result, ends.join(" "), ends.some((end) => end.includes("failed")) ? "bad" : "good");
  }

  /** Path and body of the call for one target. */
  call(name) {
    const prompt = byId("prompt").value;
    const body = {
      model: name,
      max_tokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
    };
    const hasTemplate = this.hasTemplate || this.adapters.get(name)?.has_own_template;
    return hasTemplate
      ? ["v1/chat/completions", { ...body, messages: [{ role: "user", content: prompt }] }]
      : ["v1/completions", { ...body, prompt }];
  }
}

/** One column: who answers, how fast, what was thought before the answer, and the text. */
class Answer {
  constructor(name, isBase) {
    this.name = name;
    this.facts = make("p", { class: "quiet" }, "waiting …");
    this.text = make("div", { class: "output", tabindex: "0", role: "group", "aria-label": `Answer of ${name}` });
    this.thought = null;
    this.error = make("p", { class: "error" });
    const kind = make("span", { class: "quiet" }, isBase ? "base " : "adapter ");
    this.element = make("article", { class: "answer" }, make("h3", {}, kind, name), this.facts, this.error, this.text);
    this.begun = performance.now();
    this.first = null;
    this.last = null;
    this.numTokens = 0;
    this.reason = "";
  }

  /** Stream the answer; return a sentence about how it ended. */
  async run(path, body, signal) {
    try {
      for await (const event of stream(path, body, signal)) {
        this.take(event);
      }
      this.tell();
      return `${this.name}: ${count(this.numTokens)} tokens.`;
    } catch (error) {
      const isStopped = signal.aborted;
      this.reason = isStopped ? "stopped" : "failed";
      this.tell();
      write(this.error, isStopped ? "" : error.message);
      return `${this.name} ${isStopped ? "was stopped" : "failed"}.`;
    }
  }

  take(event) {
    const choice = event.choices?.[0];
    const thought = choice?.delta?.reasoning_content ?? "";
    const text = choice?.delta?.content ?? choice?.text ?? "";
    if (thought !== "" || text !== "") {
      this.last = performance.now();
      this.first ??= this.last;
      this.numTokens += 1;
    }
    if (thought !== "") {
      this.think(thought);
    }
    this.text.append(text);
    this.reason = choice?.finish_reason ?? this.reason;
    this.numTokens = event.usage?.completion_tokens ?? this.numTokens;
    this.tell();
  }

  /** Show more of a thought, which comes before the text. */
  think(thought) {
    if (this.thought === null) {
      this.thought = make("div", { class: "thought quiet" }, make("span", { class: "unseen" }, "Thought: "));
      this.text.append(this.thought);
    }
    this.thought.append(thought);
  }

  tell() {
    const spent = (this.last - this.first) / 1000;
    const perSecond = this.numTokens > 1 && spent > 0 ? rate((this.numTokens - 1) / spent) : NONE;
    const first = this.first === null ? NONE : seconds((this.first - this.begun) / 1000);
    const facts = [`first token ${first}`, `${perSecond} tokens/s`, `${count(this.numTokens)} tokens`];
    write(this.facts, [...facts, this.reason].filter(Boolean).join(" · "));
  }
}
