"""SST-2 (Socher et al. 2013; GLUE): is a sentence of a film review positive or negative."""

from typing import ClassVar, Literal

from deltalab.data.tasks.choice import ChoiceTask


class SST2Task(ChoiceTask):
    """Sentences with a label 0 (negative) or 1 (positive); tested on GLUE's dev set, whose own test split has no labels."""

    task: Literal["sst2"] = "sst2"
    path: str = "nyu-mll/glue:sst2"
    prompt: str = "Is this review positive or negative? {sentence}"

    labels: ClassVar = ("negative", "positive")
    texts: ClassVar = {"sentence": ("sentence",)}
    test_names: ClassVar = ("validation", "test_is_glue_dev", "dev")
