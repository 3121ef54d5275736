// Marks, in the lists of levels, those of which there is no file here. The values stay the levels'
// names, so that a workflow is the same on every machine.
import { app } from "../../scripts/app.js";

const here = new Map(); // node type -> Map of input name -> the values that have a file

function learn(type, definition) {
  const { required, optional } = definition?.input ?? {};
  const known = new Map();
  for (const [name, spec] of Object.entries({ ...required, ...optional })) {
    if (Array.isArray(spec?.[1]?.here)) known.set(name, new Set(spec[1].here));
  }
  if (known.size) here.set(type, known);
}

function mark(node) {
  const type = node.comfyClass;
  for (const widget of here.has(type) ? (node.widgets ?? []) : []) {
    if (!here.get(type).has(widget.name)) continue;
    widget.options.getOptionLabel = (value) => {
      const known = here.get(type).get(widget.name);
      return value && known && !known.has(value) ? `${value} (no file)` : (value ?? "");
    };
  }
}

app.registerExtension({
  name: "ideogram4_quant.levels",
  beforeRegisterNodeDef(type, definition) {
    if (definition.name?.startsWith("Ideogram4Quant")) learn(definition.name, definition);
  },
  nodeCreated: mark,
  refreshComboInNodes(definitions) {
    for (const type of here.keys()) learn(type, definitions[type]);
  },
});
