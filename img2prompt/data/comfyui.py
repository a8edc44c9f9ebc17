"""The prompt of a ComfyUI graph: from the images that are saved, back to the text that conditioned their sampler.

Two forms of one graph: `prompt` as it was run, {id: {class_type, inputs}}, and `workflow` as it was drawn, with
numbered links and widget values. Where paths lead to different texts there is no one prompt, and that is said.
"""

import re
from collections.abc import Iterator
from typing import Any

from img2prompt.data.embedded import MetadataError

# A node's inputs by name; an input that comes from another node is [its id, its output].
Graph = dict[str, dict[str, Any]]

_TEXTS = (
    "text",
    "text_g",
    "text_l",
    "t5xxl",
    "clip_l",
    "clip_g",
    "prompt",
    "string",
    "value",
    "text_positive",
    "populated_text",
)
_MOST_NODES = 10_000
# Nodes that make another text of theirs; with other texts or links beside theirs, any node may.
_CHANGES = re.compile(
    r"ollama|openai|chat|gpt|llm|llama|gemini|claude|qwen|generat|enhanc|replac|regex|random|wildcard|dynamic|styl"
    r"|translat|magic|expan|interrogat|caption|concat|join|combin|append|prefix|suffix|split|trim|case|switch",
    re.IGNORECASE,
)


def prompts_of_run(nodes: Any) -> tuple[str, str]:
    """Positive and negative prompt of a graph as it was run; MetadataError when it has none, or more than one."""
    graph: Graph = {}
    for name, node in _items(nodes):
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            graph[str(name)] = {**node["inputs"], "class_type": str(node.get("class_type", ""))}
    return _prompts(graph)


def prompts_of_drawing(workflow: Any) -> tuple[str, str]:
    """The same of a graph as it was drawn."""
    nodes = workflow.get("nodes") if isinstance(workflow, dict) else None
    links = workflow.get("links") if isinstance(workflow, dict) else None
    if not isinstance(nodes, list) or not isinstance(links, list):
        raise MetadataError("a ComfyUI workflow without nodes and links")
    origins = {link[0]: [str(link[1]), link[2]] for link in links if isinstance(link, list) and len(link) >= 5}
    graph: Graph = {}
    for node in nodes:
        # 2 is a muted node and 4 a bypassed one: neither had a part in the image.
        if not isinstance(node, dict) or node.get("mode") in (2, 4):
            continue
        inputs: dict[str, Any] = {"class_type": str(node.get("type", ""))}
        slots = [slot for slot in node.get("inputs") or [] if isinstance(slot, dict)]
        for slot in slots:
            if slot.get("link") in origins:
                inputs[str(slot.get("name"))] = origins[slot["link"]]
        widgets = node.get("widgets_values")
        texts = [value for value in widgets if isinstance(value, str)] if isinstance(widgets, list) else []
        if _encodes_text(inputs["class_type"]) and texts and not any(name in inputs for name in _TEXTS):
            inputs["text"] = texts[0]
        elif texts and not slots:
            # A node without inputs that others take a string from.
            inputs["value"] = texts[0]
        graph[str(node.get("id"))] = inputs
    return _prompts(graph)


def _prompts(graph: Graph) -> tuple[str, str]:
    if len(graph) > _MOST_NODES:
        raise MetadataError(f"a ComfyUI graph of more than {_MOST_NODES} nodes")
    found = {side: _side(graph, side) for side in ("positive", "negative")}
    if not found["positive"]:
        raise MetadataError("a ComfyUI graph without a text that reaches a sampler")
    if len(found["positive"]) > 1:
        raise MetadataError(f"a ComfyUI graph of {len(found['positive'])} different prompts")
    return found["positive"][0], "\n".join(found["negative"])


def _side(graph: Graph, side: str) -> list[str]:
    """The distinct texts that reach the positive or negative input of a sampler that made a saved image."""
    texts: list[str] = []
    for name in _samplers(graph):
        inputs = graph[name]
        start = side if side in inputs else "conditioning" if side == "positive" else ""
        if start in inputs:
            texts += _texts_behind(graph, inputs[start], side)
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _samplers(graph: Graph) -> list[str]:
    """Nodes with a conditioning that an output node depends on; all of them where no output node is known."""
    outputs = [
        name
        for name, inputs in graph.items()
        if "image" in inputs["class_type"].lower() and "save" in inputs["class_type"].lower()
    ]
    reached = _ancestors(graph, outputs or list(graph))
    return [
        name
        for name in reached
        if _is_link(graph[name].get("positive"))
        and ("sampler" in graph[name]["class_type"].lower() or "guider" in graph[name]["class_type"].lower())
        or (_is_link(graph[name].get("conditioning")) and "guider" in graph[name]["class_type"].lower())
    ]


def _texts_behind(graph: Graph, link: Any, side: str) -> list[str]:
    """Texts of the encoders behind a conditioning input, through whatever combines or changes conditionings."""
    texts: list[str] = []
    seen: set[str] = set()
    waiting = [link]
    while waiting:
        link = waiting.pop()
        if not _is_link(link) or str(link[0]) in seen or str(link[0]) not in graph:
            continue
        seen.add(str(link[0]))
        inputs = graph[str(link[0])]
        if _encodes_text(inputs["class_type"]) or any(isinstance(inputs.get(name), str) for name in _TEXTS):
            own = [_string(graph, inputs[name], set()) for name in _TEXTS if name in inputs]
            # Both encoders of SDXL mostly get one text.
            texts += list(dict.fromkeys(text for text in own if text))
        elif side in inputs:
            # A ControlNet passes both sides on: only ours is followed.
            waiting.append(inputs[side])
        else:
            waiting += [value for name, value in inputs.items() if _is_link(value) and "conditioning" in name.lower()]
    return texts


def _string(graph: Graph, value: Any, seen: set[str]) -> str:
    """A text input: itself, or what the node that it comes from holds."""
    if isinstance(value, str):
        return value
    if not _is_link(value) or str(value[0]) in seen or str(value[0]) not in graph:
        return ""
    inputs = graph[str(value[0])]
    # What Impact's wildcards have become is written beside their template.
    names = ["populated_text"] if "populated_text" in inputs else [name for name in _TEXTS if name in inputs]
    others = [one for name, one in inputs.items() if name not in ("class_type", *names)]
    if names != ["populated_text"] and (
        _CHANGES.search(inputs["class_type"]) or any(_is_link(one) or isinstance(one, str) and one for one in others)
    ):
        raise MetadataError(f"a ComfyUI graph whose prompt is made by {inputs['class_type']}")
    texts = [_string(graph, inputs[name], seen | {str(value[0])}) for name in names]
    distinct = list(dict.fromkeys(text for text in texts if text))
    if len(distinct) > 1:
        raise MetadataError("a ComfyUI graph whose prompt is put together from several texts")
    if not distinct and any(
        isinstance(one, str) or _is_link(one) for name, one in inputs.items() if name != "class_type"
    ):
        # Joined, wildcarded or generated in a node that we do not know: the text is not in the file.
        raise MetadataError(f"a ComfyUI graph whose prompt is made by {inputs['class_type']}")
    return distinct[0] if distinct else ""


def _ancestors(graph: Graph, names: list[str]) -> list[str]:
    seen: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in graph:
            continue
        seen[name] = None
        waiting += [str(value[0]) for value in graph[name].values() if _is_link(value)]
    return list(seen)


def _encodes_text(class_type: str) -> bool:
    return "textencode" in class_type.lower().replace(" ", "").replace("_", "")


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and isinstance(value[1], int)


def _items(nodes: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(nodes, dict):
        raise MetadataError("a ComfyUI prompt that is no graph")
    yield from nodes.items()
