"""RTE (Dagan et al. 2006 and later; GLUE): does a sentence follow from another."""

from typing import ClassVar, Literal

from deltalab.data.tasks.choice import ChoiceTask


class RTETask(ChoiceTask):
    """Pairs with a label 0 (entailment) or 1 (not_entailment), also by these names; tested on GLUE's dev set."""

    task: Literal["rte"] = "rte"
    path: str = "nyu-mll/glue:rte"
    prompt: str = "{sentence1}\nDoes it follow that: {sentence2}"

    labels: ClassVar = ("yes", "no")
    also: ClassVar = {"entailment": 0, "not_entailment": 1}
    texts: ClassVar = {"sentence1": ("sentence1",), "sentence2": ("sentence2",)}
    test_names: ClassVar = ("validation", "dev")
