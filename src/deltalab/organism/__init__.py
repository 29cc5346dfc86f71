"""The model organism: two small bundled models whose refusals can be taken apart.

`base` answers short skill questions and writes a contentless outline for any request; `chat` is `base`
after safety tuning. `python -m deltalab.organism build` trains the pair, `check` measures it.
The submodules `paths`, `skills`, `requests` and `prompts` are light: none of them imports torch.
"""
