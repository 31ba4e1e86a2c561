"""What a catalogue has cost and what it saved, for who has to answer for it."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace

from .review import gate_verdict, wanted_pictures
from .sheets import Result

SUMMARY = "summary.json"


def summarise(results: Collection[Result], changed: Collection[str] = ()) -> dict:
    """Counts of a catalogue, as JSON takes them.

    A wanted picture is a first try with its retries: it is accepted if one of them is, rejected if all of them are.
    changed: names of results whose pictures are no longer those that a person decided about; they count as undecided.
    """
    tries = wanted_pictures(_undecided(result) if result.name in changed else result for result in results)
    made = [result for one in tries.values() for result in one]
    states = Counter(map(_state, tries.values()))
    seconds = [result.seconds for result in made if result.seconds is not None]
    loras = [lora for result in made for lora in (result.content_adapter, result.style_adapter) if lora]
    return {
        "wanted": len(tries),
        "accepted_at_first_try": states["first"],
        "accepted_after_retries": states["later"],
        "rejected": states["rejected"],
        "undecided": states["undecided"],
        "changed_since_decided": len(changed),
        "pictures_made": len(made),
        "failed": sum(bool(result.error) for result in results),
        "rejected_for": _counted(result.decision_reason for result in made if result.decision == "rejected"),
        "decided_by": _counted(result.decided_by for result in made if result.decision),
        "gate": _counted(map(gate_verdict, made)),
        "seconds": round(sum(seconds), 1),
        "seconds_a_picture": round(sum(seconds) / len(seconds), 1) if seconds else None,
        "pictures_without_time": len(made) - len(seconds),
        "loras": len(set(loras)),
        "lora_uses": len(loras),
    }


def _undecided(result: Result) -> Result:
    return replace(result, decision="", decision_reason="", decided_by="")


def _state(tries: list[Result]) -> str:
    decisions = [result.decision for result in tries]
    if "accepted" in decisions:
        return "first" if decisions[0] == "accepted" and not tries[0].retry_of else "later"
    return "rejected" if all(decision == "rejected" for decision in decisions) else "undecided"


def _counted(texts: Iterable[str]) -> dict[str, int]:
    return dict(Counter(filter(None, texts)).most_common())


def summary_text(summary: dict) -> str:
    """A summary in a few lines."""
    reasons = ", ".join(f"{reason}: {count}" for reason, count in summary["rejected_for"].items())
    lines = [
        f"{summary['pictures_made']} pictures made of {summary['wanted']} wanted ones: "
        f"{summary['accepted_at_first_try']} accepted at the first try, {summary['accepted_after_retries']} after "
        f"retries, {summary['rejected']} rejected{f' ({reasons})' if reasons else ''}, "
        f"{summary['undecided']} undecided."
    ]
    if summary["changed_since_decided"]:
        lines.append(f"Changed after the decision, so undecided again: {summary['changed_since_decided']}.")
    if summary["seconds_a_picture"] is not None:
        lines.append(
            f"Machine time: {summary['seconds_a_picture']} s a picture, {summary['seconds'] / 60:.1f} min in all."
        )
    if summary["lora_uses"]:
        reused = summary["lora_uses"] - summary["loras"]
        lines.append(f"{summary['loras']} LoRAs for {summary['lora_uses']} uses: trainings reused {reused} times.")
    return "\n".join(lines)
