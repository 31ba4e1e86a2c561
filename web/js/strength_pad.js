// A pad on the guidance nodes: content across, style up. The values are those of the plain widgets, which stay
// what is saved and queued; the pad only shows and turns them. It turns one axis without touching the other.

import { app } from "../../../scripts/app.js";

const NODES = ["ConsisLoRAGuider", "ConsisLoRASampler"];
const IMAGES = ["content", "style"]; // by axis
const PAIRS = {
  guidance: { most: 4, step: 0.1 }, // as far as the paper shows
  strength: { most: 2, step: 0.05 },
};
const CHOICE = "consislora_pad"; // in the node's properties: the pair that the pad turns
const HEIGHT = 190;
const MARGIN = 10; // that the classic canvas leaves around an element
const GRIP = 8; // pixels around the knob: a drag that begins there turns an axis only once it leaves them
const WATCH = 200; // milliseconds: values also change elsewhere, and no event tells of it
const SUBGRAPH_INPUT = -10; // where links in a subgraph begin that come from outside, to the frontend
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };

const STYLE = `
.consislora-pad { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; font-size: 11px;
  min-height: ${HEIGHT - 2 * MARGIN}px; color: var(--input-text, #ddd); }
.consislora-pad select { background: var(--comfy-input-bg, #222); color: inherit; border: none; border-radius: 4px;
  padding: 2px 4px; font-size: 11px; }
.consislora-pad .field { position: relative; flex: 1; min-height: 0; border-radius: 4px; cursor: crosshair;
  touch-action: none; background-color: var(--comfy-input-bg, #222);
  background-image: linear-gradient(#8884 1px, transparent 1px), linear-gradient(90deg, #8884 1px, transparent 1px);
  background-size: 25% 25%; }
.consislora-pad .field:focus-visible { outline: 2px solid #64b5f6; }
.consislora-pad .knob { position: absolute; width: 12px; height: 12px; margin: 0 0 -6px -6px; border-radius: 50%;
  background: #64b5f6; border: 2px solid #fff; pointer-events: none; box-sizing: border-box; }
.consislora-pad .value { position: absolute; pointer-events: none; opacity: 0.8; }
.consislora-pad .across { right: 4px; bottom: 2px; }
.consislora-pad .up { left: 4px; top: 2px; }
`;

app.registerExtension({
  name: "ConsisLoRA.StrengthPad",
  setup() {
    document.head.append(element("style", "", STYLE));
  },
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) addPad(node);
  },
});

function addPad(node) {
  const root = element("div", "consislora-pad");
  const choice = element("select");
  const field = element("div", "field");
  const [knob, across, up] = ["knob", "value across", "value up"].map((kind) => element("div", kind));
  field.append(knob, across, up);
  field.tabIndex = 0;
  field.setAttribute("role", "application");
  root.append(choice, field);

  const pair = () => (PAIRS[node.properties[CHOICE]] ? node.properties[CHOICE] : "guidance");
  const widgets = () => IMAGES.map((image) => queuedWidget(node, `${image}_${pair()}`));
  const box = () => field.getBoundingClientRect();
  const share = (value) => Math.min(Math.max(value / PAIRS[pair()].most, 0), 1);
  let shown;

  function show() {
    const [content, style] = widgets().map(({ value }) => value);
    if (shown === `${pair()} ${content} ${style}`) return;
    shown = `${pair()} ${content} ${style}`;
    const [nameOfContent, nameOfStyle] = IMAGES.map((image) => words(ownWidget(node, `${image}_${pair()}`)));
    knob.style.left = `${100 * share(content)}%`;
    knob.style.bottom = `${100 * share(style)}%`;
    choice.value = pair();
    across.textContent = `${nameOfContent} ${content.toFixed(2)} →`;
    up.textContent = `↑ ${nameOfStyle} ${style.toFixed(2)}`;
    field.setAttribute("aria-label", `${across.textContent} ${up.textContent}`);
  }

  // axis: 0 across, 1 up.
  function turn(axis, value) {
    const { step } = PAIRS[pair()];
    const one = widgets()[axis];
    const { min, max } = ownWidget(node, `${IMAGES[axis]}_${pair()}`).options;
    one.value = Math.min(Math.max(Number((Math.round(value / step) * step).toFixed(2)), min), max);
    one.callback?.(one.value, app.canvas, node);
    show();
    node.graph?.setDirtyCanvas(true, true);
  }

  const pointer = (event) => [event.clientX - box().left, box().bottom - event.clientY];
  const knobAt = () => widgets().map(({ value }, axis) => share(value) * [box().width, box().height][axis]);
  let held; // while dragging: by axis, where the knob was if it was gripped, else null

  function follow(event) {
    pointer(event).forEach((place, axis) => {
      if (held[axis] !== null && Math.abs(place - held[axis]) <= GRIP) return;
      held[axis] = null;
      const reached = Math.min(Math.max(place / [box().width, box().height][axis], 0), 1);
      turn(axis, reached * PAIRS[pair()].most);
    });
  }

  field.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.stopPropagation(); // or the node would be dragged
    field.setPointerCapture(event.pointerId);
    const at = pointer(event);
    held = knobAt().map((place, axis) => (Math.abs(at[axis] - place) <= GRIP ? place : null));
    follow(event);
  });
  field.addEventListener("pointermove", (event) => {
    if (field.hasPointerCapture(event.pointerId)) follow(event);
  });
  field.addEventListener("pointerup", () => app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState());
  field.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    event.stopPropagation(); // or the arrows would move the node
    const stride = PAIRS[pair()].step * (event.shiftKey ? 10 : 1);
    const axis = ARROWS[event.key].findIndex((way) => way);
    turn(axis, widgets()[axis].value + stride * ARROWS[event.key][axis]);
  });
  choice.addEventListener("change", () => {
    node.properties[CHOICE] = choice.value;
    show();
  });

  for (const name of Object.keys(PAIRS)) {
    const [content, style] = IMAGES.map((image) => words(ownWidget(node, `${image}_${name}`)));
    choice.append(Object.assign(element("option", "", `${content} × ${style}`), { value: name }));
  }
  const watch = setInterval(show, WATCH);
  after(node, "onRemoved", () => clearInterval(watch));
  const pad = node.addDOMWidget("strength_pad", "consislora_pad", root, {
    serialize: false,
    hideInPanel: true, // where newer frontends list widgets, they show nothing of it, and make it narrower on the node
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  pad.serialize = false; // neither in the workflow nor in what is queued
  show();
}

function ownWidget(node, name) {
  return node.widgets.find((one) => one.name === name);
}

// The widget whose value is queued for an input: the node's own, or that of the subgraph around it which feeds it.
function queuedWidget(node, name) {
  const link = node.graph?.getLink?.(node.inputs?.find(({ widget }) => widget?.name === name)?.link);
  const [host, ...others] = Number(link?.origin_id) === SUBGRAPH_INPUT ? hostsOf(node.graph) : [];
  // Several hosts have a value each, and none is the one that is looked into.
  const outer = host && !others.length && queuedWidget(host, host.inputs[link.origin_slot].name);
  return outer || ownWidget(node, name);
}

// The nodes that stand for a subgraph.
function hostsOf(subgraph) {
  const graphs = [app.graph, ...app.graph.subgraphs.values()];
  return graphs.flatMap(({ nodes }) => nodes).filter((node) => node.subgraph === subgraph);
}

// The widget's name in the language of the frontend.
function words(widget) {
  return widget.label ?? widget.name;
}

function after(object, method, then) {
  const before = object[method];
  object[method] = function (...given) {
    const result = before?.apply(this, given);
    then();
    return result;
  };
}

function element(tag, className = "", text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}
