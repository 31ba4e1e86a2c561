// A workflow of the demo opens with its pictures: those that ComfyUI's input folder lacks are put there, and it is said.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const LOADERS = ["LoadImage", "LoadVideo"];
const SUMMARIES = { en: "The demo's pictures", ja: "デモの画像", zh: "演示图片" };
const DETAILS = {
  en: (names) => `Put into ComfyUI's input folder: ${names}`,
  ja: (names) => `ComfyUIのinputフォルダに入れました: ${names}`,
  zh: (names) => `已放入 ComfyUI 的 input 文件夹：${names}`,
};

app.registerExtension({
  name: "ConsisLoRA.DemoPictures",
  async beforeConfigureGraph({ nodes }) {
    if (!nodes.some(({ type }) => type === "ConsisLoRADemoModel")) return;
    const names = nodes.filter(({ type }) => LOADERS.includes(type)).map(({ widgets_values }) => widgets_values?.[0]);
    const answer = await api.fetchApi("/consislora/demo_pictures", { method: "POST", body: JSON.stringify(names) });
    const brought = answer.ok ? await answer.json() : []; // else the nodes say themselves what they lack
    if (!brought.length) return;
    await app.refreshComboInNodes();
    const language = app.ui.settings.getSettingValue("Comfy.Locale")?.slice(0, 2);
    app.extensionManager.toast.add({
      severity: "info",
      summary: SUMMARIES[language] ?? SUMMARIES.en,
      detail: (DETAILS[language] ?? DETAILS.en)(brought.join(", ")),
      life: 10_000,
    });
  },
});
