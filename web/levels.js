// Marks, in the lists of levels, those of which there is no file here. The values stay the levels'
// names, so that a workflow is the same on every machine.
import { app } from "../../scripts/app.js";

const FILES = ["conditional_file", "unconditional_file"];
const BY_LEVEL = "by level";
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

// Whoever picks a level wants it: file names that a workflow brought for its downloads give way.
function letLevelRule(node) {
  const level = node.widgets?.find((w) => w.name === "level");
  const files = node.widgets?.filter((w) => FILES.includes(w.name)) ?? [];
  if (node.comfyClass !== "Ideogram4QuantLoad" || !level) return;
  const before = level.callback;
  level.callback = function (...args) {
    before?.apply(this, args);
    for (const widget of files) widget.value = BY_LEVEL;
  };
}

app.registerExtension({
  name: "ideogram4_quant.levels",
  beforeRegisterNodeDef(type, definition) {
    if (definition.name?.startsWith("Ideogram4Quant")) learn(definition.name, definition);
  },
  nodeCreated(node) {
    mark(node);
    letLevelRule(node);
  },
  refreshComboInNodes(definitions) {
    for (const type of here.keys()) learn(type, definitions[type]);
  },
});
