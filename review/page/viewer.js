// The three pictures: zoomed and moved together, and the photo over the result up to a slider.

const MOST = 8; // times the size that fits
const STEP = 1.2; // a notch of the wheel
const GROUNDS = ["white", "grey", "dark"]; // below cut-outs, as in style.css; none: that of the page

export class Viewer {
  constructor(section) {
    this.section = section;
    this.slider = section.querySelector("#slider");
    this.slider.addEventListener("input", () => this.slide(this.slider.value));
    this.fit();
    this.slide(100);
    for (const stage of section.querySelectorAll("#content .stage, #result .stage")) {
      stage.addEventListener("wheel", (event) => this.onWheel(event, stage), { passive: false });
      stage.addEventListener("pointerdown", (event) => stage.setPointerCapture(event.pointerId));
      stage.addEventListener("pointermove", (event) => {
        if (stage.hasPointerCapture(event.pointerId)) this.drag(event, stage);
      });
      stage.addEventListener("dblclick", () => this.toggleZoom());
    }
  }

  fit() {
    this.place(1, 0, 0);
  }

  // zoom: times the size that fits. x, y: of the middle, in shares of the stage.
  place(zoom, x, y) {
    const most = (zoom - 1) / 2;
    this.zoom = zoom;
    [this.x, this.y] = [x, y].map((value) => Math.min(Math.max(value, -most), most));
    this.section.style.setProperty("--zoom", zoom);
    this.section.style.setProperty("--x", `${100 * this.x}%`);
    this.section.style.setProperty("--y", `${100 * this.y}%`);
    this.section.classList.toggle("zoomed", zoom > 1);
  }

  // To one pixel of the picture on one of the screen, or closer where that is not larger than what fits; and back.
  toggleZoom() {
    const picture = this.section.querySelector("#result .made");
    const fits = Math.min(picture.clientWidth / picture.naturalWidth, picture.clientHeight / picture.naturalHeight);
    this.place(this.zoom > 1 ? 1 : Math.min(Math.max(1 / fits / devicePixelRatio, 2.5), MOST), this.x, this.y);
  }

  onWheel(event, stage) {
    event.preventDefault();
    const box = stage.getBoundingClientRect();
    const zoom = Math.min(Math.max(this.zoom * (event.deltaY < 0 ? STEP : 1 / STEP), 1), MOST);
    const at = [(event.clientX - box.left) / box.width - 0.5, (event.clientY - box.top) / box.height - 0.5];
    const [x, y] = [this.x, this.y].map((value, axis) => at[axis] - ((at[axis] - value) * zoom) / this.zoom);
    this.place(zoom, x, y); // the point under the pointer stays there
  }

  drag(event, stage) {
    const box = stage.getBoundingClientRect();
    if (this.zoom > 1) {
      this.place(this.zoom, this.x + event.movementX / box.width, this.y + event.movementY / box.height);
    } else if (this.isComparing && stage.parentElement.id === "result") {
      this.slide((100 * (event.clientX - box.left)) / box.width);
    }
  }

  // share: of the width from which on the result shows; 0 is the result alone.
  slide(share) {
    const value = Math.min(Math.max(share, 0), 100);
    this.slider.value = value;
    this.section.style.setProperty("--share", `${value}%`);
  }

  get isComparing() {
    return this.section.classList.contains("comparing");
  }

  toggleCompare() {
    this.section.classList.toggle("comparing");
    this.slide(50);
  }

  // ground: one of GROUNDS, or null.
  layOn(ground) {
    this.ground = ground;
    document.body.dataset.ground = ground ?? "";
  }

  changeGround() {
    this.layOn(GROUNDS[(GROUNDS.indexOf(this.ground) + 1) % GROUNDS.length]);
    return this.ground;
  }
}
