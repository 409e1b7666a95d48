// One race at a time: an order goes out, events come back as lines of JSON. Text from outside is
// inserted as textContent alone.

const $ = (id) => document.getElementById(id);
const form = $("order");
const field = (name) => form.elements.namedItem(name); // [name] finds "length" of the list
const SWITCHES = ["draft_cache", "tree_shape", "tree_nodes", "tree_attention", "budget", "gate"];
const OWN = ""; // value of the choice of one's own text; the others are keys of the server
const PHASES = {
  prefill: "prefill", draft_prefill: "draft’s prefill", verify: "verify", accept: "accept",
  retrieve: "retrieve", draft: "draft",
};
const number = (n) => n.toLocaleString("en");

let offer = null;
let race = null; // what is on show: see `begin`
let asked = null; // the question that was sent last: see the form’s submission
let talk = null; // the conversation that can go on: the server's key of it, and its document
let running = false;

class Refused extends Error {} // with a text for people

async function request(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refused("The server does not answer; is it still running?");
  }
  if (answer.ok) return answer;
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error ?? message;
  } catch { /* the status has to do */ }
  throw new Refused(message);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch {
      throw new Refused("The connection broke off; is the server still running?");
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// ---- the order ----------------------------------------------------------------------------------

function addOption(select, value, text) {
  const option = document.createElement("option");
  option.value = value;
  option.textContent = text;
  select.append(option);
}

function show(found) {
  offer = found;
  const { defaults } = offer;
  $("facts").textContent =
    `Target ${offer.target}, on ${offer.machine}. Version ${offer.version}.`;
  addOption($("document"), OWN, "A text of your own");
  for (const [key, name] of Object.entries(offer.documents)) addOption($("document"), key, name);
  for (const [key, { name }] of Object.entries(offer.drafts)) addOption($("draft"), key, name);
  $("hint").textContent = offer.has_template
    ? "about the document" : "this model only continues: it stands at the text’s end";
  if (offer.has_template) field("instruction").value = "Summarize this document.";
  for (const name of ["length", "new_tokens", "temperature", "draft", ...SWITCHES]) {
    field(name).value = defaults[name];
  }
  field("tree_attention").checked = defaults.tree_attention;
  field("gate").checked = defaults.gate === "auto";
  field("document").value = defaults.document ?? OWN;
  adapt();
}

// What goes with what was chosen.
function adapt() {
  const own = field("document").value === OWN;
  $("own").hidden = !own;
  $("length-field").hidden = own;
  field("length").disabled = own; // a hidden field must not keep the form from being sent
  const { name, caches } = offer.drafts[field("draft").value];
  const cache = field("draft_cache");
  for (const option of cache.options) {
    option.disabled = caches.length > 1 && !caches.includes(option.value);
  }
  if (cache.selectedOptions[0].disabled) cache.value = "retrieval";
  cache.disabled = caches.length === 1; // it reads in its own way
  field("budget").disabled = cache.disabled || cache.value === "full";
  field("tree_nodes").disabled = field("tree_shape").value === "fixed";
  const reads = cache.disabled ? "" : `, reads ${cache.selectedOptions[0].textContent}`;
  $("chosen").textContent = `– ${name}${reads}`;
  offerButtons();
}

function offerButtons() {
  $("go").disabled = running;
  const same = talk !== null && JSON.stringify(about()) === JSON.stringify(talk.about);
  $("further").disabled = running || !same; // another document begins another conversation
}

// The document that the form names.
function about() {
  if (field("document").value === OWN) return { text: field("text").value };
  return { document: field("document").value, length: Number(field("length").value) };
}

function order() {
  const given = (name) => field(name).value;
  const result = {
    instruction: given("instruction"),
    new_tokens: Number(given("new_tokens")),
    temperature: Number(given("temperature")),
    draft: given("draft"),
    draft_cache: given("draft_cache"),
    tree_shape: given("tree_shape"),
    tree_nodes: Number(given("tree_nodes")),
    tree_attention: field("tree_attention").checked,
    budget: Number(given("budget")),
    gate: field("gate").checked ? "auto" : "off",
  };
  if (asked.follows) return { ...result, conversation: talk.key };
  if ((asked.about.text ?? "").length > offer.max_chars) throw tooLong();
  return { ...result, ...asked.about };
}

const tooLong = () =>
  new Refused(`The text is too long: at most ${number(offer.max_chars)} characters.`);

function complain(error) {
  if (!(error instanceof Refused)) console.error(error);
  $("error").textContent = error.message;
  $("error").hidden = false;
}

$("file").addEventListener("change", async () => {
  const file = $("file").files[0];
  if (!file) return;
  $("error").hidden = true;
  if (file.size > 4 * offer.max_chars) complain(tooLong());
  else field("text").value = await file.text();
});

form.addEventListener("change", adapt);

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  $("error").hidden = true;
  running = true;
  offerButtons();
  $("stop").disabled = false;
  $("status").textContent = "Preparing …";
  try {
    asked = {
      follows: event.submitter === $("further"),
      question: field("instruction").value.trim(),
      about: about(),
    };
    const answer = await request("api/run", order());
    for await (const each of events(answer)) take(each);
  } catch (error) {
    complain(error);
  }
  running = false;
  offerButtons();
  $("stop").disabled = true;
  if (!$("error").hidden) $("status").textContent = "";
});

$("stop").addEventListener("click", async () => {
  $("stop").disabled = true;
  $("status").textContent = "Stopping …";
  try {
    await request("api/stop", {});
  } catch (error) {
    complain(error);
  }
});

// ---- a race -------------------------------------------------------------------------------------

function take(event) {
  if (event.event === "start") begin(event);
  else if (event.event === "prefill") prefill(event);
  else if (event.event === "round") round(event);
  else if (event.event === "done") finish(event);
  else throw new Refused(event.message);
}

class Column {
  constructor(name) {
    this.section = $(name);
    this.text = this.section.querySelector(".text");
    this.bar = this.section.querySelector("progress");
    this.count = 0;
    this.rate = 0;
  }

  figures(rate, acceptance) {
    this.rate = rate;
    this.section.querySelector(".rate").textContent = rate ? rate.toFixed(1) : "–";
    this.section.querySelector(".acceptance").textContent = acceptance.toFixed(2);
  }

  read(total, cached) {
    this.prompt = cached
      ? `${number(total)} tokens: ${number(cached)} were there, ${number(total - cached)} read`
      : `${number(total)} tokens, all of them read`;
    this.section.querySelector(".read").textContent = `Prompt of ${this.prompt}`;
  }

  progress(value, max) {
    this.bar.max = Math.max(max, 1);
    this.bar.value = value;
  }

  write(text, kind) {
    const followed = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    const span = document.createElement("span");
    if (kind) span.className = kind;
    const visible = text.trimStart();
    if (kind === "target" && visible) { // underlined, but not its indentation
      const underlined = document.createElement("u");
      underlined.textContent = visible;
      span.append(text.slice(0, text.length - visible.length), underlined);
    } else span.textContent = text;
    this.text.append(span);
    if (followed) this.text.scrollTop = this.text.scrollHeight;
  }
}

function begin(event) {
  race = { ...event, columns: { plain: new Column("plain"), spec: new Column("spec") } };
  if (!asked.follows) {
    talk = null;
    $("talk").hidden = true;
    $("turns").replaceChildren();
  }
  for (const column of Object.values(race.columns)) {
    column.section.querySelector(".read").textContent = "";
    column.text.replaceChildren();
    column.write(event.tail, "before");
    column.figures(0, 1);
    column.progress(0, 1);
  }
  $("times").textContent = "";
  $("outcome").hidden = true;
  $("race").hidden = false;
  drawStrip();
}

function prefill({ column, done, total }) {
  race.columns[column].progress(done, total);
  const who = column === "plain" ? "Plain decoding" : "SpecExtend";
  $("status").textContent = `${who} reads the prompt: ${number(done)} of ${number(total)} tokens`;
}

function round({ column: name, pieces, accepted, rate, acceptance, chunks, gap, cached }) {
  const column = race.columns[name];
  if (gap) column.write(gap, "before");
  if (cached !== undefined) column.read(race.prompt_tokens, cached);
  pieces.forEach((piece, i) => {
    const own = i < accepted ? "accepted" : "target";
    column.write(piece, name === "spec" ? own : "");
    if (name === "spec") {
      const chunk = Math.floor((race.prompt_tokens + column.count + i) / race.chunk_size);
      race.chunks[chunk] = (race.chunks[chunk] ?? "") + piece;
    }
  });
  column.count += pieces.length;
  column.figures(rate, acceptance);
  column.progress(column.count, race.new_tokens);
  const { plain, spec } = race.columns;
  if (plain.rate && spec.rate) {
    $("times").textContent = `${(spec.rate / plain.rate).toFixed(2)} times plain decoding`;
    $("status").textContent = "Decoding in turns …";
  }
  if (chunks) light(chunks);
}

function finish({ stopped, difference, columns, conversation, answer }) {
  for (const [name, result] of Object.entries(columns)) {
    race.columns[name].write(result.tail);
    race.columns[name].figures(result.rate, result.acceptance);
  }
  const [plain, spec] = [columns.plain.tokens.length, columns.spec.tokens.length];
  $("status").textContent = stopped ? "Stopped." : "Done.";
  const common = number(Math.min(plain, spec));
  $("verdict").textContent = difference ? `The texts differ: ${difference}`
    : !stopped ? `The same text: all of ${common} tokens are identical`
    : common === "0" ? "Stopped before both had begun to write"
    : `Stopped. The same text, as far as both came: ${common} tokens`;
  const seconds = (value) => (value === null ? "–" : value.toFixed(2));
  $("phases").replaceChildren(...Object.entries(PHASES).map(([phase, name]) => {
    const row = document.createElement("tr");
    const cells = [name, ...["plain", "spec"].map((key) => seconds(columns[key].seconds[phase]))];
    cells.forEach((text, i) => {
      const cell = document.createElement(i ? "td" : "th");
      if (!i) cell.scope = "row";
      cell.textContent = text;
      row.append(cell);
    });
    return row;
  }));
  $("outcome").hidden = false;
  if (answer !== null) remember(conversation, answer);
}

// ---- the conversation ---------------------------------------------------------------------------

function remember(key, answer) {
  if (talk === null) {
    const { text, document: name, length } = asked.about;
    $("talk-about").textContent = text !== undefined ? "about a text of your own"
      : `about ${offer.documents[name]}, ${number(length)} tokens`;
  }
  talk = { key, about: asked.about };
  const turn = document.createElement("li");
  const add = (tag, kind, text) => {
    const part = document.createElement(tag);
    part.className = kind;
    part.textContent = text;
    turn.append(part);
    return part;
  };
  add("p", "question", asked.question || "(no question: the text goes on)");
  const shown = add("pre", "answer", answer.trim() ? answer : "(nothing)");
  shown.tabIndex = 0; // for the arrow keys to scroll it
  shown.setAttribute("aria-label", "Answer");
  const { plain, spec } = race.columns;
  add("p", "quiet", plain.prompt === spec.prompt ? `Both: ${plain.prompt}`
    : `Plain decoding: ${plain.prompt}; SpecExtend: ${spec.prompt}`);
  $("turns").append(turn);
  $("talk").hidden = false;
}

// ---- the strip ----------------------------------------------------------------------------------

function drawStrip() {
  const prompt = race.chunks.length;
  const total = Math.ceil((race.prompt_tokens + race.new_tokens) / race.chunk_size);
  const cells = Array.from({ length: race.retrieves ? total : 0 }, (_, i) => {
    const cell = document.createElement("span");
    cell.className = i < prompt ? "cell" : "cell new";
    return cell;
  });
  $("strip").replaceChildren(...cells);
  $("strip").hidden = $("chunk").hidden = !race.retrieves;
  race.shown = -1;
  $("chunk").textContent = "";
  $("chunk-title").textContent = race.retrieves
    ? "Point at a cell, tap it, or use the arrow keys to read its chunk." : "";
  const size = `${number(race.prompt_tokens)} tokens`;
  if (!race.retrieves) {
    $("strip-note").textContent =
      `This draft chooses no chunks of the prompt’s ${size}: it reads in its own way.`;
  } else if (race.prompt_tokens <= race.budget) {
    $("strip-note").textContent = `The prompt’s ${size} fit into what the draft can read.`;
  } else {
    $("strip-note").textContent =
      `The prompt’s ${size} in chunks of ${race.chunk_size}; lit are those the draft reads.`;
  }
}

function light(chunks) {
  const cells = $("strip").children;
  for (const cell of $("strip").querySelectorAll(".lit")) cell.classList.remove("lit");
  for (const i of chunks) cells[i]?.classList.add("lit");
  $("strip-note").textContent =
    `The target’s attention chose ${chunks.length} of ${race.chunks.length} chunks: the draft ` +
    `reads ${number(Math.min(race.budget, race.prompt_tokens))} of the prompt’s ` +
    `${number(race.prompt_tokens)} tokens.`;
  inspect(race.shown < 0 ? chunks[1] ?? chunks[0] : race.shown); // what it says may be over
}

function inspect(index) {
  const cells = $("strip").children;
  if (!race || index < 0 || index >= cells.length) return;
  cells[race.shown]?.classList.remove("shown");
  cells[index].classList.add("shown");
  race.shown = index;
  const size = race.chunk_size;
  const lit = cells[index].classList.contains("lit") ? ", read by the draft now" : "";
  $("chunk-title").textContent =
    `Chunk ${index}: tokens ${number(index * size)} to ${number((index + 1) * size - 1)}${lit}`;
  const text = race.chunks[index] ?? "(not written yet)";
  if ($("chunk").textContent !== text) $("chunk").textContent = text; // else it is read out again
}

for (const kind of ["pointerover", "click"]) {
  $("strip").addEventListener(kind, (event) => {
    const index = [...$("strip").children].indexOf(event.target);
    if (index >= 0) inspect(index);
  });
}

$("strip").addEventListener("keydown", (event) => {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
  const last = $("strip").children.length - 1;
  const to = event.key === "Home" ? 0 : event.key === "End" ? last
    : event.key in steps ? Math.min(Math.max(race.shown + steps[event.key], 0), last) : null;
  if (to === null) return;
  event.preventDefault();
  inspect(to);
});

request("api/offer").then((answer) => answer.json()).then(show).catch(complain);
