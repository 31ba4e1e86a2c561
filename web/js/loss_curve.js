// The loss of every step on a training node, as it grows and once it has ended. Each phase has a colour of its own:
// the two losses are not on one scale.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NODES = ["ConsisLoRATrainImage", "ConsisLoRATrainStyle", "ConsisLoRATrainImages"];
const COLOURS = { noise: "#64b5f6", reconstruction: "#ffb74d" };
const WIDTH = 300;
const HEIGHT = 90;
const AVERAGED = 25; // steps: a single step's loss mostly says how noisy its sample was

app.registerExtension({
  name: "ConsisLoRA.LossCurve",
  setup() {
    api.addEventListener("consislora.loss", ({ detail }) => {
      const node = nodeAt(detail.node);
      if (NODES.includes(node?.comfyClass)) curveOf(node).add(detail); // another workflow may be open by now
    });
  },
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      const [curve] = output?.consislora_loss ?? [];
      if (curve) curveOf(node).add(curve);
    };
  },
});

// A node inside of subgraphs is named by the way to it, such as 7:3.
function nodeAt(path) {
  return String(path)
    .split(":")
    .reduce((found, id) => (found?.subgraph ?? found)?.getNodeById?.(id), app.graph);
}

function curveOf(node) {
  node.consisloraCurve ??= new Curve(node);
  return node.consisloraCurve;
}

class Curve {
  constructor(node) {
    this.first = 0; // the step of the first loss: a page that is opened in the middle of a training has missed some
    this.losses = [];
    this.root = document.createElement("div");
    this.root.className = "consislora-loss";
    this.root.style.cssText = "width: 100%; height: 100%; position: relative; font-size: 11px";
    this.root.addEventListener("pointermove", (event) => this.showStepAt(event));
    const widget = node.addDOMWidget("loss_curve", "consislora_loss", this.root, {
      serialize: false,
      hideInPanel: true, // as the pad of the sampler
      getMinHeight: () => HEIGHT + 20,
      getMaxHeight: () => HEIGHT + 20,
    });
    widget.serialize = false;
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  }

  // losses: of the steps from `first` on, counted from 0. phases: [loss, steps] of each. caption: time and memory.
  add({ first, losses, phases, caption }) {
    const known = first - this.first;
    if (known < 0 || known > this.losses.length) [this.first, this.losses] = [first, []];
    this.losses = [...this.losses.slice(0, first - this.first), ...losses];
    this.caption = caption ?? this.caption;
    this.phases = phases;
    this.draw();
  }

  draw() {
    let start = 0;
    const steps = this.phases.reduce((sum, [, length]) => sum + length, 0);
    const curves = this.phases.map(([kind, length]) => {
      const [from, to] = [start, start + length].map((step) => Math.max(step - this.first, 0)); // of the losses
      const part = averaged(this.losses.slice(from, to).map((loss) => Math.log(Math.max(loss, 1e-12))));
      const [low, high] = [Math.min(...part), Math.max(...part)];
      const points = part.map((loss, i) => {
        const [x, y] = [(this.first + from + i + 0.5) / steps, high > low ? (high - loss) / (high - low) : 0.5];
        return `${(x * WIDTH).toFixed(1)},${(4 + y * (HEIGHT - 8)).toFixed(1)}`;
      });
      const edge = (start / steps) * WIDTH;
      start += length;
      return `<line x1="${edge}" x2="${edge}" y1="0" y2="${HEIGHT}" stroke="#8886" />
        <polyline points="${points.join(" ")}" fill="none" stroke="${COLOURS[kind]}" stroke-width="1.5"
          vector-effect="non-scaling-stroke" />`;
    });
    this.root.innerHTML = `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none"
      style="width: 100%; height: ${HEIGHT}px; background: var(--comfy-input-bg, #222); border-radius: 4px">
      ${curves.join("")}</svg><div style="display: flex; justify-content: space-between">
      <span class="words"></span><span class="caption">${this.caption ?? ""}</span></div>`;
    this.showStep(this.first + this.losses.length - 1);
  }

  showStep(step) {
    const before = (count) => this.phases.slice(0, count).reduce((sum, [, length]) => sum + length, 0);
    const phase = this.phases.findIndex((_, i) => step < before(i + 1));
    const loss = this.losses[step - this.first];
    if (loss === undefined || phase < 0) return;
    const kind = this.phases[phase][0];
    const words = this.root.querySelector(".words");
    words.style.color = COLOURS[kind];
    words.textContent = `${kind} ${loss.toPrecision(3)} · ${step + 1} / ${before(this.phases.length)}`;
  }

  showStepAt(event) {
    const box = this.root.getBoundingClientRect();
    const steps = this.phases.reduce((sum, [, length]) => sum + length, 0);
    this.showStep(Math.floor(((event.clientX - box.left) / box.width) * steps));
  }
}

function averaged(values) {
  let sum = 0;
  return values.map((value, i) => {
    sum += value - (i >= AVERAGED ? values[i - AVERAGED] : 0);
    return sum / Math.min(i + 1, AVERAGED);
  });
}
