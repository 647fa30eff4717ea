// The table of adapters: sorted, filtered and paged here, whatever their number; and what is done
// to them.

import { ask } from "./api.js";
import { byId, make, say, write } from "./dom.js";
import { bytes, count, moment, NONE, rate, share } from "./format.js";

const NARROW = window.matchMedia("(max-width: 52rem)"); // as in page.css
const pageRows = () => (NARROW.matches ? 10 : 25);
const MAX_SOURCE = 36;
const MEASURE_S = 1.5; // the least time that speeds are measured over
const TONES = { loaded: "good", failed: "bad", draining: "wait" };
const ranks = (adapter) =>
  adapter.ranks.length > 1 ? `${adapter.ranks[0]}–${adapter.ranks.at(-1)}` : `${adapter.ranks[0] ?? NONE}`;
const tier = (adapter) => (adapter.tier ? `${adapter.tier}${adapter.is_pinned ? ", pinned" : ""}` : NONE);
/** A state's badge; of a download how far it is, once its size is known. */
const badge = ({ state, num_downloaded_bytes: done, num_bytes_to_download: all }) =>
  state === "downloading" && all ? `${state} ${share(done / all)}` : state;

// Title, text of a cell, what it is sorted by; numbers begin with the largest.
const COLUMNS = [
  { id: "name", title: "Name", by: (a) => a.name },
  { id: "state", title: "State", by: (a) => a.state },
  { id: "variant", title: "Variant", text: (a) => a.variant || NONE, by: (a) => a.variant },
  { id: "rank", title: "Rank", text: ranks, by: (a) => a.ranks.at(-1) ?? 0, isNumber: true },
  { id: "tier", title: "Tier", text: tier, by: tier },
  { id: "size", title: "Size", text: (a) => bytes(a.num_bytes), by: (a) => a.num_bytes, isNumber: true },
  { id: "running", title: "Running", text: (a) => count(a.num_in_flight), by: (a) => a.num_in_flight, isNumber: true },
  { id: "requests", title: "Requests", text: (a) => count(a.num_requests), by: (a) => a.num_requests, isNumber: true },
  { id: "tokens", title: "Tokens", text: (a) => count(a.num_output_tokens), by: (a) => a.num_output_tokens, isNumber: true },
  { id: "speed", title: "Tokens/s", text: (a) => rate(a.tokens_per_s), by: (a) => a.tokens_per_s, isNumber: true },
];

const compare = new Intl.Collator("en", { numeric: true }).compare;

/** The panel of adapters. */
export class Adapters {
  /** `compareWith(name)` is called for one that is to be tried, `changed()` after an action. */
  constructor({ compareWith, changed }) {
    this.compareWith = compareWith;
    this.changed = changed;
    this.adapters = [];
    this.rows = new Map();
    this.page = 0;
    this.sorted = { column: COLUMNS[0], descending: false };
    this.measured = { at: 0, tokens: new Map(), speeds: new Map() };
    this.drawHeads();
    byId("filter").addEventListener("input", () => this.turnTo(0));
    byId("filter-state").addEventListener("change", () => this.turnTo(0));
    byId("page-back").addEventListener("click", () => this.turnTo(this.page - 1));
    byId("page-on").addEventListener("click", () => this.turnTo(this.page + 1));
    NARROW.addEventListener("change", () => this.drawRows());
    byId("load-form").addEventListener("submit", (event) => this.load(event));
  }

  /** Show what the server has now. */
  show(adapters, base) {
    this.adapters = this.withSpeeds(adapters);
    const loaded = adapters.filter((adapter) => adapter.state === "loaded").length;
    const alone = base && `base alone: ${count(base.num_requests)} requests, ${count(base.num_output_tokens)} tokens`;
    const summary = [`${count(loaded)} of ${count(adapters.length)} loaded`, alone];
    write(byId("adapters-summary"), summary.filter(Boolean).join(" · "));
    this.offerStates();
    this.drawRows();
  }

  withSpeeds(adapters) {
    const at = performance.now() / 1000;
    const before = this.measured;
    const spent = at - before.at;
    if (spent >= MEASURE_S) {
      const tokens = new Map(adapters.map((a) => [keyOf(a), a.num_output_tokens]));
      const speed = ([key, num]) => [key, Math.max(0, num - (before.tokens.get(key) ?? num)) / spent];
      this.measured = { at, tokens, speeds: new Map([...tokens].map(speed)) };
    }
    const { speeds } = this.measured;
    return adapters.map((a) => ({ ...a, tokens_per_s: speeds.get(keyOf(a)) ?? 0 }));
  }

  drawHeads() {
    for (const column of COLUMNS) {
      const button = make("button", { type: "button", class: "sorter" }, column.title);
      button.addEventListener("click", () => this.sortBy(column));
      const kind = column.isNumber ? "number" : false;
      column.head = make("th", { role: "columnheader", scope: "col", class: kind }, button);
      byId("columns").append(column.head);
      byId("sort").append(make("option", { value: column.id }, column.title));
    }
    byId("columns").append(
      make("th", { role: "columnheader", scope: "col" }, make("span", { class: "unseen" }, "Actions")),
    );
    byId("sort").addEventListener("change", (event) => {
      this.sorted.column = null;
      this.sortBy(COLUMNS.find((column) => column.id === event.target.value));
    });
    this.markSorted();
  }

  sortBy(column) {
    const descending = this.sorted.column === column ? !this.sorted.descending : !!column.isNumber;
    this.sorted = { column, descending };
    this.markSorted();
    this.turnTo(0);
  }

  markSorted() {
    for (const { head } of COLUMNS) {
      head.removeAttribute("aria-sort");
    }
    const { column, descending } = this.sorted;
    column.head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    byId("sort").value = column.id;
  }

  turnTo(page) {
    this.page = page;
    this.drawRows();
  }

  offerStates() {
    const select = byId("filter-state");
    const offered = new Set([...select.options].map((option) => option.value));
    for (const { state } of this.adapters) {
      if (!offered.has(state)) {
        offered.add(state);
        select.append(make("option", { value: state }, state));
      }
    }
  }

  found() {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const state = byId("filter-state").value;
    const matches = (adapter) => {
      const text = `${adapter.name} ${adapter.source} ${adapter.variant}`.toLowerCase();
      return (!state || adapter.state === state) && words.every((word) => text.includes(word));
    };
    const { column, descending } = this.sorted;
    const sign = descending ? -1 : 1;
    const order = column.isNumber
      ? (a, b) => sign * (column.by(a) - column.by(b)) || compare(a.name, b.name)
      : (a, b) => sign * compare(column.by(a), column.by(b)) || compare(a.name, b.name);
    return this.adapters.filter(matches).sort(order);
  }

  drawRows() {
    const found = this.found();
    const numRows = pageRows();
    const numPages = Math.max(1, Math.ceil(found.length / numRows));
    this.page = Math.min(Math.max(0, this.page), numPages - 1);
    const first = this.page * numRows;
    const shown = found.slice(first, first + numRows);
    const rows = new Map();
    for (const adapter of shown) {
      const row = this.rows.get(keyOf(adapter)) ?? new Row(this);
      row.show(adapter);
      rows.set(keyOf(adapter), row);
    }
    this.rows = rows;
    place(byId("rows"), [...rows.values()].flatMap((row) => row.elements()));
    const nothing = this.adapters.length ? "No adapter matches." : "No adapters yet: load one above.";
    write(byId("no-rows"), found.length ? "" : nothing);
    byId("pages").hidden = numPages === 1;
    byId("page-back").disabled = this.page === 0;
    byId("page-on").disabled = this.page === numPages - 1;
    const last = first + shown.length;
    write(byId("page-number"), `${count(first + 1)} to ${count(last)} of ${count(found.length)}`);
  }

  async load(event) {
    event.preventDefault();
    const name = byId("load-name").value.trim();
    const body = { lora_name: name, lora_path: byId("load-source").value.trim() };
    if (byId("load-replace").checked) {
      body.load_inplace = true;
    }
    byId("load-button").disabled = true;
    const isDone = await this.act(`Loading ${name} …`, `${name} is loaded.`, "v1/load_lora_adapter", body);
    byId("load-button").disabled = false;
    if (isDone) {
      byId("load-form").reset();
      byId("load-name").focus();
    }
  }

  async unload(adapter, opener) {
    const running = adapter.num_in_flight
      ? `Its ${count(adapter.num_in_flight)} running requests end first; new ones are refused at once.`
      : "Requests that name it are refused from then on.";
    write(byId("unload-heading"), `Unload ${adapter.name}?`);
    write(byId("unload-text"), running);
    const dialog = byId("unload-dialog");
    dialog.returnValue = "no";
    dialog.showModal();
    byId("unload-no").focus();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue !== "yes") {
      opener.focus();
      return;
    }
    const body = { lora_name: adapter.name };
    const { name } = adapter;
    await this.act(`Unloading ${name} …`, `${name} is unloaded.`, "v1/unload_lora_adapter", body);
    (opener.isConnected ? opener : byId("adapters-heading")).focus();
  }

  async rollBack(adapter) {
    const { name } = adapter;
    const path = `api/adapters/${name.split("/").map(encodeURIComponent).join("/")}/rollback`;
    await this.act(`Rolling ${name} back …`, `${name} has its former content again.`, path, {});
  }

  /** Do something and say how it went, as the server words it; true where it was done. */
  async act(before, after, path, body) {
    const result = byId("adapters-result");
    say(result, before);
    try {
      await ask(path, body);
      say(result, after, "good");
      return true;
    } catch (error) {
      say(result, error.message, "bad");
      return false;
    } finally {
      await this.changed();
    }
  }
}

let numMade = 0;

/** One adapter's row, and below it, once opened, what else is known of it. */
class Row {
  constructor(panel) {
    this.panel = panel;
    this.isOpen = false;
    numMade += 1;
    const id = `about-${numMade}`;
    this.opener = make("button", { type: "button", class: "opener", "aria-expanded": "false", "aria-controls": id });
    this.source = make("span", { class: "source" });
    this.error = make("span", { class: "error" });
    this.badge = make("span", { class: "badge" });
    this.facts = make("dl", { class: "about" });
    const width = COLUMNS.length + 1;
    const cell = make("td", { role: "cell", colspan: width, "aria-colspan": width }, this.facts);
    this.details = make("tr", { role: "row", class: "details", id }, cell);
    this.details.hidden = true;
    this.cells = COLUMNS.map((column) => this.cell(column));
    this.element = make("tr", { role: "row" }, ...this.cells, this.actions());
    this.opener.addEventListener("click", () => this.open(!this.isOpen));
  }

  cell(column) {
    const attributes = { role: "cell", class: `${column.id}${column.isNumber ? " number" : ""}`, "data-label": column.title };
    if (column.id === "name") {
      const head = { ...attributes, role: "rowheader", scope: "row" };
      return make("th", head, this.opener, this.source, this.error);
    }
    return make("td", attributes, ...(column.id === "state" ? [this.badge] : []));
  }

  actions() {
    const action = (title, act) => {
      const button = make("button", { type: "button" }, title);
      button.addEventListener("click", () => act(this.adapter, button));
      return button;
    };
    this.tryIt = action("Try", ({ name }) => this.panel.compareWith(name));
    this.back = action("Roll back", (adapter) => this.panel.rollBack(adapter));
    this.unload = action("Unload", (adapter, button) => this.panel.unload(adapter, button));
    const buttons = make("div", {}, this.tryIt, this.back, this.unload);
    return make("td", { role: "cell", class: "actions" }, buttons);
  }

  elements() {
    return [this.element, this.details];
  }

  show(adapter) {
    this.adapter = adapter;
    write(this.opener, adapter.name);
    this.opener.title = adapter.name;
    write(this.source, tail(adapter.source));
    this.source.title = adapter.source;
    write(this.error, adapter.error);
    write(this.badge, badge(adapter));
    this.badge.dataset.tone = TONES[adapter.state] ?? "busy";
    COLUMNS.forEach((column, index) => {
      if (column.text) {
        write(this.cells[index], column.text(adapter));
      }
    });
    const isGoing = adapter.state === "draining";
    this.tryIt.hidden = adapter.state !== "loaded";
    this.back.hidden = isGoing || !adapter.has_former;
    this.unload.hidden = isGoing;
    for (const [button, verb] of [[this.tryIt, "Try"], [this.back, "Roll back"], [this.unload, "Unload"]]) {
      button.setAttribute("aria-label", `${verb} ${adapter.name}`);
    }
  }

  async open(isOpen) {
    this.isOpen = isOpen;
    this.opener.setAttribute("aria-expanded", String(isOpen));
    this.details.hidden = !isOpen;
    if (!isOpen) {
      return;
    }
    const path = `api/adapters/${this.adapter.name.split("/").map(encodeURIComponent).join("/")}`;
    try {
      this.tell(await ask(path));
    } catch (error) {
      this.facts.replaceChildren(...fact("Not shown", error.message));
    }
  }

  tell(known) {
    const pairs = (object) => Object.entries(object ?? {}).map(([name, value]) => `${name}: ${value}`);
    const facts = [
      ["Source", known.source],
      ["Error", known.error],
      ["Loaded", moment(known.loaded_at_s)],
      ["Digest", known.digest],
      ["Before it", known.former_digest],
      ["Parameters", known.num_parameters ? count(known.num_parameters) : ""],
      ["Acts on", (known.target_modules ?? []).join(", ")],
      ["Layers", known.num_layers ? `${known.num_layers}, by its own map` : ""],
      ["Template", known.has_own_template ? "its own" : "the base's"],
      ["Honoured", pairs(known.honoured).join("; ")],
      ["Without effect here", pairs(known.inert).join("; ")],
      ...(known.notes ?? []).map((note) => ["Note", note]),
    ];
    const told = facts.filter(([, value]) => value !== "" && value !== undefined);
    this.facts.replaceChildren(...told.flatMap(([name, value]) => fact(name, value)));
  }
}

function fact(name, value) {
  return [make("dt", {}, name), make("dd", {}, String(value))];
}

/** The end of a long source, which tells it from others. */
function tail(source) {
  return source.length <= MAX_SOURCE ? source : `…${source.slice(1 - MAX_SOURCE)}`;
}

/** A name may stand more than once: its former contents may still drain. */
function keyOf(adapter) {
  return JSON.stringify(adapter.state === "draining" ? [adapter.name, adapter.digest] : [adapter.name]);
}

/** Put children in order; those in place stay untouched, and so does the focus. */
function place(parent, children) {
  const wanted = new Set(children);
  const focused = document.activeElement;
  for (const child of [...parent.children]) {
    if (!wanted.has(child)) {
      child.remove();
    }
  }
  children.forEach((child, index) => {
    if (parent.children[index] !== child) {
      parent.insertBefore(child, parent.children[index] ?? null);
    }
  });
  if (document.activeElement !== focused && focused?.isConnected) {
    focused.focus({ preventScroll: true });
  }
}
