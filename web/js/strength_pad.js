// A pad on the guidance nodes: content across, style up. The values are those of the plain widgets, which stay
// what is saved and queued; the pad only shows and turns them.

import { app } from "../../../scripts/app.js";

const NODES = ["ConsisLoRAGuider", "ConsisLoRASampler"];
const PAIRS = {
  guidance: { most: 4, step: 0.1 }, // as far as the paper shows
  strength: { most: 2, step: 0.05 },
};
const CHOICE = "consislora_pad"; // in the node's properties: the pair that the pad turns
const HEIGHT = 190;
const MARGIN = 10; // that the classic canvas leaves around an element
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

  const widget = (image, pair) => node.widgets.find(({ name }) => name === `${image}_${pair}`);
  const pair = () => (PAIRS[node.properties[CHOICE]] ? node.properties[CHOICE] : "guidance");
  const pairOfWidgets = () => ["content", "style"].map((image) => widget(image, pair()));

  function show() {
    const { most } = PAIRS[pair()];
    const [content, style] = pairOfWidgets();
    const share = (value) => 100 * Math.min(Math.max(value / most, 0), 1);
    knob.style.left = `${share(content.value)}%`;
    knob.style.bottom = `${share(style.value)}%`;
    choice.value = pair();
    across.textContent = `${words(content)} ${content.value.toFixed(2)} →`;
    up.textContent = `↑ ${words(style)} ${style.value.toFixed(2)}`;
    field.setAttribute("aria-label", `${across.textContent} ${up.textContent}`);
  }

  function turn(values) {
    const { most, step } = PAIRS[pair()];
    pairOfWidgets().forEach((one, i) => {
      const value = Math.min(Math.max(values[i], 0), most);
      one.value = Number((Math.round(value / step) * step).toFixed(2));
      one.callback?.(one.value, app.canvas, node);
    });
    show();
    node.graph?.setDirtyCanvas(true, true);
  }

  function follow(event) {
    const { most } = PAIRS[pair()];
    const box = field.getBoundingClientRect();
    turn([((event.clientX - box.left) / box.width) * most, ((box.bottom - event.clientY) / box.height) * most]);
  }

  field.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.stopPropagation(); // or the node would be dragged
    field.setPointerCapture(event.pointerId);
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
    turn(pairOfWidgets().map((one, i) => one.value + stride * ARROWS[event.key][i]));
  });
  choice.addEventListener("change", () => {
    node.properties[CHOICE] = choice.value;
    show();
  });

  for (const name of Object.keys(PAIRS)) {
    const [content, style] = ["content", "style"].map((image) => words(widget(image, name)));
    choice.append(Object.assign(element("option", "", `${content} × ${style}`), { value: name }));
    for (const image of ["content", "style"]) after(widget(image, name), "callback", show);
  }
  after(node, "onConfigure", show); // a workflow was opened: the widgets have its values now
  const pad = node.addDOMWidget("strength_pad", "consislora_pad", root, {
    serialize: false,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  pad.serialize = false; // neither in the workflow nor in what is queued
  show();
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
