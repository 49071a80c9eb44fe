"""A stream's networks for frames that follow the reference, which is not among them: nearly all calls of a stream.

Layer 4. The contract has an input that says of each frame whether it is the reference, whose own keys and values are
then attended to and returned. For a frame that follows, each key-frame attention would compute its own for nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posecrafter_rt.spec import IS_REFERENCE, NetworkSpec

if TYPE_CHECKING:
    import openvino

REFERENCES_OWN = "new_keyframe_kv_"  # outputs that only a reference's frame has


def following(spec: NetworkSpec) -> NetworkSpec:
    """Return a network's contract if no frame is the reference: without that input and the outputs that only it has.

    A network without that input keeps its contract.
    """
    if all(tensor.name != IS_REFERENCE for tensor in spec.inputs):
        return spec
    asked = tuple(tensor for tensor in spec.inputs if tensor.name != IS_REFERENCE)
    given = tuple(tensor for tensor in spec.outputs if not tensor.name.startswith(REFERENCES_OWN))
    return replace(spec, inputs=asked, outputs=given)


def leave_out_reference(model: openvino.Model) -> None:
    """Make a stream's network one for frames without the reference, in place; leave any other as it is."""
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
    """Return the node that a condition was made of by slicing and reshaping."""
    node = condition.get_node()
    while node.get_type_name() in ("Slice", "Unsqueeze", "Reshape", "Broadcast"):
        node = node.input_value(0).get_node()
    return node
