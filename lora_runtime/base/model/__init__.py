"""The ways in which transformers' model is changed to become a base.

transformers owns the model: its module tree, its forward, its families. `loader.prepare_base` makes
the changes in this order, compares the changed model with the untouched one (`self_check`), and
only then quantises. Nothing in transformers itself is patched: every change is to one model's
modules, apart from the attention functions, which are registered under names of ours.

What is no part of a model's text is taken out of it first (`parts.py`).

1. Rotary frequencies are fixed in place (`rotary.py`). transformers computes those of `longrope`
   and `dynamic` anew from the longest row of every batch, so a row would depend on its neighbours.
2. Linear layers, embedding and output layer are replaced by `setattr` (`loader.py`,
   `adapted_linear.py`, `quant_linear.py`, `int8_linear.py`). Adapters and quantised weights act
   there. All of them share one StepContext, which says what acts during the forward that runs.
3. The attention function is ours (`attention.py`), registered with transformers'
   AttentionInterface. The forward is given an `Attention` object as keyword `attention=`, which
   transformers hands through to it: the paged cache in serving, whole rows in training
   (`varlen_attention.py`). Where a family's layers keep that keyword to themselves, a subclass of
   theirs leaves it at the module that attends (`handing_on.py`). For one forward at load the
   function is another, which notes how each layer attends (`base/observed_attention.py`).
4. A module's class becomes a subclass (`module.__class__ = …`, `fused_modules.py`), whose forward
   runs as one op what were two to ten. Attributes, names and parameters stay, and the
   subclass calls the original's forward wherever a fused op cannot run.
5. A layer's norm is computed early, with the sum before it, and handed on as an attribute of the
   sum (`fused_modules.py`, `_Layer`). Only the norm it was made for takes it, and only from that
   tensor.
6. Linear layers that are given the same tensor run as one (`stacked_linears.py`): the first that is
   called with it computes for all, the others take their slices. This joins q, k and v without
   rewriting any family's attention.
7. Module trees are copied without their parameters (`shallow_copy`, `with_submodule` in
   `reordered_model.py`), where a forward differs in structure: layers in another order
   (`reordered_model.py`), the part behind the decoder alone (`head_model.py`), activation
   checkpointing (`base/recompute.py`), another dtype (`base/dtype_view.py`). The model itself is
   not changed, and weights are not duplicated.
8. Experts and their routers are replaced (`experts.py`, `routers.py`): a mixture runs as groups of
   rows of one weight, and adapters act on both.
9. Recurrent layers become subclasses of theirs too, by a table (`recurrent_layers.py`,
   `recurrent_mixers.py`): each row's state is where the `Attention` object says (`recurrence.py`).
10. A decoder layer in a copy of 7. is wrapped by a module that delegates all attributes
    (`WrappedLayer` in `reordered_model.py`), as decoders ask layers for some.

`requirement.py` raises BaseRefused, which names transformers' version and what is missing, where
a version lacks an attribute that these changes rely on.
"""
