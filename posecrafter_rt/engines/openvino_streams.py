"""Networks of a stream for frames that follow a reference, which is not among them: nearly all that a stream ever calls.

Layer 4. Their contract asks of each frame whether it is the reference, whose own keys and values are then attended to and
given. For a frame that follows, those would be computed for nobody, in each key-frame attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posecrafter_rt.spec import IS_REFERENCE, NetworkSpec

if TYPE_CHECKING:
    import openvino

REFERENCES_OWN = "new_keyframe_kv_"  # outputs that only a reference's frame has


def following(spec: NetworkSpec) -> NetworkSpec:
    """A network's contract where no frame is the reference: without the question, and without outputs of its own; itself where
    it does not ask.
    """
    if all(tensor.name != IS_REFERENCE for tensor in spec.inputs):
        return spec
    asked = tuple(tensor for tensor in spec.inputs if tensor.name != IS_REFERENCE)
    given = tuple(tensor for tensor in spec.outputs if not tensor.name.startswith(REFERENCES_OWN))
    return replace(spec, inputs=asked, outputs=given)


def leave_out_reference(model: openvino.Model) -> None:
    """Make a stream's network one for frames of which none is the reference, in place; any other stays as it is."""
    parameter = next((each for each in model.get_parameters() if IS_REFERENCE in each.output(0).get_names()), None)
    if parameter is None:
        return
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Select" and _asked(node.input_value(0)).get_name() == parameter.get_name():
            node.output(0).replace(node.input_value(2))
    for result in model.get_results():
        if any(name.startswith(REFERENCES_OWN) for name in result.input_value(0).get_names()):
            model.remove_result(result)
    model.remove_parameter(parameter)


def _asked(condition: Any) -> Any:
    """The node that a condition is of, in whatever shape."""
    node = condition.get_node()
    while node.get_type_name() in ("Slice", "Unsqueeze", "Reshape", "Broadcast"):
        node = node.input_value(0).get_node()
    return node
