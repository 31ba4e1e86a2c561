// An entry in ComfyUI's menu that opens the page on which people accept and reject the results of a catalogue.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "ConsisLoRA.Review",
  commands: [
    {
      id: "ConsisLoRA.Review",
      label: "Review a catalogue",
      icon: "pi pi-check-square",
      function: () => window.open(api.fileURL("/consislora/review"), "consislora_review"),
    },
  ],
  menuCommands: [{ path: ["ConsisLoRA"], commands: ["ConsisLoRA.Review"] }],
});
