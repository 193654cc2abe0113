"""The model card of an exported PRM: what it is, how to score with it, its data, what was measured.

A card is read again by whoever exports or trains from its folder: the model of the hub that a chain
of runs began with, and its licence, come down that way.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dreamprm_dist.errors import InputError
from dreamprm_dist.prm.model_folder import CARD, resolve_model

DATA_FLAGS = (
    *("train_json_file", "meta_json_file", "train_on_meta", "max_patch_num", "label_context"),
)
CARD_METRICS = ("iteration", "epoch", "lower_loss", "weighted_loss", "meta_loss", "weight_mean")
_TAG = "dreamprm_dist"
_INHERITED = ("base_model", "license", "license_name", "license_link")
# Flags that say nothing where no meta set is read, besides those that begin with "meta_".
_OF_META = {
    *("aggregation_function", "loss_target", "score_over", "group_meta_by_question", "rollback"),
    *("hypergradient", "hypergradient_scope", "precondition", "unroll_window", "train_on_meta"),
}
# Reweighters that learn nothing, and what is trained with them.
_PLAIN = {
    "uniform": "plain fine-tuning",
    "fixed": "fine-tuning on fixed weights, one for each instance",
}
_USE = """\
In this folder (`pip install` dreamprm_dist; no torchvision is needed):

```python
from dreamprm_dist import PRM

prm = PRM.from_pretrained("."{score_over})  # or the model's name on the hub
image = None  # or a path, encoded bytes, a Pillow image, or a list of them
print(prm.score(image, "Is 7 odd?", ["7 = 2 * 3 + 1.", "Answer: yes"]))
best = prm.best_of_n(image, "Is 7 odd?", ["Answer: yes", "Answer: no"], aggregation="{aggregation}")
print(best.index, best.scores)
```

Step scores become a solution's score by `{aggregation}`{chosen}. {layout}
"""
_LAYOUTS = {
    "transformers": "`AutoModelForImageTextToText`, `AutoTokenizer` and `AutoImageProcessor` of "
    "transformers read the folder too; `AutoProcessor`, whose InternVL processor takes videos, "
    "wants `pip install torchvision` first.",
    "original": "The layout is that of `InternVLChatModel`, as vLLM and OpenGVLab's code read it; "
    "`AutoTokenizer` and `AutoImageProcessor` of transformers read the folder too.",
}


@dataclass
class ModelCard:
    """A card that this program writes.

    Attributes:
        facts: the metadata block that model hubs read.
        intro: what the model is.
        sections: Markdown by title, without how to score, which the facts tell.
    """

    facts: dict[str, Any]
    intro: str
    sections: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_run(
        cls,
        settings: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        origin: Mapping[str, Any],
        data_sets: Mapping[str, Mapping[str, int]] | None = None,
    ) -> ModelCard:
        """The card of what a run has trained.

        Args:
            settings: the run's flags and their values, as in its `config.yaml`; may be empty.
            metrics: the last line of its `metrics.jsonl`.
            origin: what `origin` says of the model that it began with.
            data_sets: for the training and the meta set, as far as they were read, how many
                instances each data set gave.
        """
        learns = settings.get("reweighter", "uniform") not in _PLAIN
        joins = settings.get("train_on_meta", "none") != "none"
        if not (learns or joins or settings.get("meta_validation_fraction")):
            settings = {
                k: v for k, v in settings.items() if k not in _OF_META and not k.startswith("meta_")
            }
        card = cls(dict(origin), f"{_origin(settings, learns)} {_READS}")
        if "aggregation_function" in settings:
            card.facts["aggregation"] = settings["aggregation_function"]
            card.facts["aggregation_chosen"] = "that of the meta loss"
        if settings.get("score_over", "vocabulary") != "vocabulary":
            card.facts["score_over"] = settings["score_over"]
        measured = {name: metrics[name] for name in CARD_METRICS if metrics and name in metrics}
        data = {name: settings[name] for name in DATA_FLAGS if name in settings}
        sets = data_sets or {}
        data |= {f"{kind} instances": sum(counts.values()) for kind, counts in sets.items()}
        card.add("Data", data)
        for kind, counts in sets.items():
            card.add(f"Data sets of the {kind} set", counts, ("data set", "instances"))
        card.add("Settings", settings)
        card.add("Metrics", measured)
        return card

    @classmethod
    def read(cls, folder: Path) -> ModelCard | None:
        """The card in a folder, if it is one of this program's."""
        facts = _metadata(folder / CARD)
        if _TAG not in (facts.get("tags") or []):
            return None
        body = (folder / CARD).read_text(encoding="utf-8").split("\n---\n", 1)[1]
        intro, *sections = re.split(r"^## ", body.partition("\n# ")[2], flags=re.MULTILINE)
        parts = (section.partition("\n") for section in sections)
        return cls(
            facts,
            intro.partition("\n")[2].strip(),
            {title: text.strip() for title, _, text in parts if title != "Use"},
        )

    def add(
        self, title: str, values: Mapping[str, Any], columns: tuple[str, str] | None = None
    ) -> None:
        """A section with a table, unless there is nothing to say; it takes an older one's place."""
        if values:
            first, second = columns or (title.lower(), "value")
            rows = [f"| {_cell(name)} | `{_cell(value)}` |" for name, value in values.items()]
            self.sections[title] = "\n".join([f"| {first} | {second} |", "|---|---|", *rows])

    def add_results(self, results: Mapping[str, Any]) -> None:
        """An evaluation.

        Args:
            results: `test_json_file`, `num_questions`, `accuracy` by method and under `prm` by
                aggregation; where one was chosen, the `aggregation`, and `chosen_on` what.
        """
        accuracy = results["accuracy"]
        row = {"test file": results["test_json_file"], "questions": results["num_questions"]}
        row |= {
            name.replace("_", " "): f"{accuracy[name]:.1%}"
            for name in ("first", "random", "self_consistency", "oracle")
        }
        row |= {f"PRM, {name}": f"{value:.1%}" for name, value in accuracy["prm"].items()}
        self.add("Best-of-N", row)
        if "chosen_on" in results:
            self.facts["aggregation"] = results["aggregation"]
            self.facts["aggregation_chosen"] = f"chosen on {_cell(results['chosen_on'])}"

    def text(self, layout: str = "transformers") -> str:
        """The card as Markdown, for a folder in one of the two layouts."""
        facts = ModelCardData(
            **{"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
            | self.facts
            | {"tags": ["process-reward-model", _TAG]},
        )
        score_over, chosen = (facts.get(name) for name in ("score_over", "aggregation_chosen"))
        use = _USE.format(
            score_over=f', score_over="{score_over}"' if score_over else "",
            aggregation=facts.get("aggregation", "mean"),
            chosen=f" ({chosen})" if chosen else "",
            layout=_LAYOUTS[layout],
        )
        sections = {"Use": use.strip()} | self.sections
        body = [f"## {title}\n\n{text}\n" for title, text in sections.items()]
        head = f"---\n{facts.to_yaml()}\n---\n\n# Process reward model\n\n{self.intro}\n"
        return "\n".join([head, *body])


_READS = (
    "It reads an image, a question and a solution step by step; a step's score is the probability "
    "of `+` after it, at the last token of `<|im_start|>assistant\\n`."
)


def origin(name_or_path: str) -> dict[str, Any]:
    """The model of the hub that a model began with, and its licence, as far as they are known.

    A folder's own card says it; a folder that it names is asked in turn. Nothing is fetched.
    """
    name, seen = name_or_path, set()
    facts: dict[str, Any] = {}
    while isinstance(name, str) and name not in seen:
        seen.add(name)
        said = _metadata(_card_file(name))
        facts = {k: said[k] for k in _INHERITED if _is_text(said.get(k))} | facts
        if not Path(name).is_dir():
            return facts | ({"base_model": name} if _is_hub_name(name) else {})
        base = facts.pop("base_model", None)
        if isinstance(base, list):
            return facts | ({"base_model": base} if all(map(_is_hub_name, base)) else {})
        name = base
    return facts


def data_set_counts(names: Iterable[str]) -> dict[str, int]:
    """How often each data set is named, the most frequent first."""
    return dict(Counter(names).most_common())


def _card_file(name: str) -> Path | None:
    """The card of a local folder, or of a model of the hub that has been fetched."""
    if Path(name).is_dir():
        with contextlib.suppress(InputError):
            return Path(resolve_model(name), CARD)
    elif _is_hub_name(name):
        cached = try_to_load_from_cache(name, CARD)
        return Path(cached) if isinstance(cached, str) else None
    return None


def _metadata(card: Path | None) -> dict[str, Any]:
    """The metadata block of a card; empty without one that can be read."""
    try:
        return (card and metadata_load(card)) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _is_text(value: object) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def _is_hub_name(name: str) -> bool:
    """Whether it can be a model's name on the hub, which no folder of this machine has."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def _origin(settings: Mapping[str, Any], learns: bool) -> str:
    if not settings:
        return "Exported by dreamprm_dist from a folder that does not say how it was trained."
    if not learns:
        return f"Trained by dreamprm_dist with {_PLAIN[settings.get('reweighter', 'uniform')]}."
    return (
        "Trained by dreamprm_dist with bi-level optimisation, a learned weight per instance "
        f"({settings['reweighter']})."
    )


def _cell(value: object) -> str:
    """A value as a table shows it; of an absolute path, which is one machine's, the last part."""
    text = str(value)
    text = Path(text).name if Path(text).is_absolute() else text
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
