// An entry in ComfyUI's menu that opens the page on which people accept and reject the results of a catalogue.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

// The menu takes no text from a pack's locales/, which the list of key bindings does.
const LABELS = { en: "Review a catalogue", ja: "カタログを確認する", zh: "审核图册" };

app.registerExtension({
  name: "ConsisLoRA.Review",
  commands: [
    {
      id: "ConsisLoRA.Review",
      label: () => LABELS[app.ui.settings.getSettingValue("Comfy.Locale")?.slice(0, 2)] ?? LABELS.en,
      icon: "pi pi-check-square",
      function: () => window.open(api.fileURL("/consislora/review"), "consislora_review"),
    },
  ],
  menuCommands: [{ path: ["ConsisLoRA"], commands: ["ConsisLoRA.Review"] }],
});
