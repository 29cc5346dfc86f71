"""MRPC (Dolan & Brockett 2005; GLUE): do two sentences say the same. Its positive class is the more frequent one."""

from typing import ClassVar, Literal

from deltalab.data.tasks.choice import ChoiceTask


class MRPCTask(ChoiceTask):
    """Pairs with a label 0 or 1 (they say the same): GLUE's columns, or those of the original files; tested on the dev set."""

    task: Literal["mrpc"] = "mrpc"
    path: str = "nyu-mll/glue:mrpc"
    prompt: str = "Do these sentences say the same? {sentence1}\n{sentence2}"

    labels: ClassVar = ("no", "yes")
    texts: ClassVar = {"sentence1": ("sentence1", "#1 String"), "sentence2": ("sentence2", "#2 String")}
    label_columns: ClassVar = ("label", "Quality")
    positive: ClassVar = 1
    test_names: ClassVar = ("validation", "dev")
