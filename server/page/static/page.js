// The status page: asks the server every two seconds while somebody looks, and shows the answer.

import { Adapters } from "./adapters.js";
import { ask, offerKey } from "./api.js";
import { Charts } from "./charts.js";
import { byId, make, write } from "./dom.js";
import { bytes, count, duration, share } from "./format.js";
import { Prompt } from "./prompt.js";

const POLL_MS = 2000;
const MAX_POLL_MS = 15000;
const STATES = {
  ready: ["ready", "good"],
  loading: ["loading", "wait"],
  "not ready": ["not taking requests", "bad"],
  dead: ["engine has died", "bad"],
};

const charts = new Charts(byId("charts"));
const prompt = new Prompt();
const adapters = new Adapters({ compareWith: (name) => prompt.add(name), changed: () => refresh() });

let seen = { startedAt: 0, numTaken: 0 };
let timer = null;
let wait = POLL_MS;
let asking = null;

/** Ask once, now; who asks meanwhile gets the same answer. */
function refresh() {
  asking ??= poll().finally(() => {
    asking = null;
  });
  return asking;
}

async function poll() {
  clearTimeout(timer);
  try {
    show(await ask(`api/status?since=${seen.numTaken}`));
    byId("trouble").hidden = true;
    wait = POLL_MS;
  } catch (error) {
    const isSilent = error instanceof TypeError;
    showState(isSilent ? "no answer" : "not shown", "bad");
    byId("trouble").hidden = false;
    write(byId("trouble"), isSilent ? "The server does not answer; asking again." : error.message);
    wait = Math.min(MAX_POLL_MS, wait * 2);
  }
  if (!document.hidden) {
    timer = setTimeout(refresh, wait);
  }
}

function show(status) {
  showState(...(STATES[status.state] ?? [status.state, "wait"]));
  if (!status.server) {
    return;
  }
  const { server, load } = status;
  showServer(server, load);
  byId("no-load").hidden = load !== null;
  byId("charts").hidden = load === null;
  if (load !== null) {
    charts.add(load.samples, server.started_at_s !== seen.startedAt);
    seen = { startedAt: server.started_at_s, numTaken: load.num_samples_taken };
  }
  prompt.show(server, status.adapters);
  adapters.show(status.adapters, load?.base);
}

function showState(text, tone) {
  byId("state").dataset.tone = tone;
  write(byId("state"), text);
}

function showServer(server, load) {
  document.title = `${server.base} · loramux`;
  write(byId("base"), server.base);
  const facts = [
    ["Quantization", server.quantization],
    ["Compute type", server.dtype],
    ["Device", server.device],
    ["Kernels", server.kernel_backend],
    ["Context", `${count(server.max_model_len)} tokens`],
    ...(load === null ? [] : loadFacts(server, load)),
    ["Up", duration(server.uptime_s)],
    ["Version", server.version],
  ];
  const list = byId("facts");
  if (list.children.length !== facts.length) {
    list.replaceChildren(...facts.map(([name]) => make("div", {}, make("dt", {}, name), make("dd"))));
  }
  facts.forEach(([, value], index) => write(list.children[index].lastChild, String(value)));
}

function loadFacts(server, load) {
  const hits = load.num_prefix_queries ? load.num_prefix_hits / load.num_prefix_queries : 0;
  return [
    ["Adapters on the device", `${count(load.num_resident_adapters)} of ${count(server.max_slots)} slots`],
    ["Adapter pool", `${bytes(load.pool_bytes_used)} of ${bytes(load.pool_bytes_total)}`],
    ["Prefix cache hits", share(hits)],
    ["Preemptions", count(load.num_preemptions)],
  ];
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    refresh();
  }
});
offerKey(refresh);
refresh();
