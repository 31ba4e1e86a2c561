"""The code of docs/python.md runs, outside of ComfyUI."""

import re
from pathlib import Path

import torch
from reference import diffusers_denoiser, diffusers_unet, relative_error, run

from consislora_core import lora_file

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"


def test_the_code_for_python_trains_a_unet_of_diffusers(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    long, short = "steps=1500, transition_step=500, rank=64", "steps=4, transition_step=2, rank=4"
    assert long in code
    monkeypatch.chdir(tmp_path)
    unet, logged = diffusers_unet(), run("stage1_content")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    cond = logged["prompt_embeds"], logged["pooled_prompt_embeds"], logged["time_ids"][None]
    page = dict(zip(("unet", "z_0", "text", "pooled", "time_ids"), (unet, logged["z_0"], *cond), strict=True))
    exec(code.replace(long, short), page)

    after = unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert capsys.readouterr().out.count("noise loss") == 2
    lora = lora_file.read(tmp_path / "crown.safetensors")
    assert lora.parts.keys() == {"content", "style"} and lora.metadata["consislora.prompt"] == "A [c]"
    assert all(layer.up.abs().sum() > 0 for part in lora.parts.values() for layer in part.values())
    x, sigma = logged["z_0"] * 2, page["sigmas"][500:501]
    with torch.no_grad():
        ours, theirs = page["denoise"](x, sigma, cond), diffusers_denoiser(unet).denoise(x, sigma, cond)
    assert relative_error(ours, theirs) < 1e-6
