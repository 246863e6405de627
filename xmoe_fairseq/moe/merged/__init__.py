"""MEO (arXiv 2310.09832): merge the matrices of the chosen experts, once per sentence, and compute one expert.

An expert is one linear map here: a feed-forward network has two banks of E maps, each with its own gate. Since the maps
are linear, the merged map computes exactly the gated sum of the experts' outputs. Merging whole networks would compute
another function, because of the activation between their maps. docs/methods.md lists the differences from the official
code, with reasons.
"""
