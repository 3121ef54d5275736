// Shows what a node said on the node itself: a read-only box below its inputs. The host sends the
// text with every run, from its cache too, so a page that was opened later shows it as well.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const HEIGHTS = new Map([
  ["Ideogram4QuantLoad", 130],
  ["Ideogram4QuantLoadLora", 90],
  ["Ideogram4QuantCaption", 110],
  ["Ideogram4QuantCheckCaption", 110],
  ["Ideogram4QuantSampler", 130],
  ["Ideogram4QuantCompare", 170],
  ["Ideogram4QuantCalibrate", 130],
  ["Ideogram4QuantQuantize", 170],
]);
const NAME = "shown";

function addBox(node) {
  const height = HEIGHTS.get(node.comfyClass);
  if (!height) return;
  const { widget } = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  widget.label = "report";
  widget.serialize = false; // neither in workflows nor in what is queued
  widget.options.serialize = false;
  widget.options.read_only = true;
  widget.options.getMinHeight = () => height;
  widget.element.readOnly = true;
  widget.element.placeholder = "After a run: what it did.";
}

function show(node, output) {
  const text = output?.text;
  const widget = text && node?.widgets?.find((w) => w.name === NAME);
  if (widget) widget.value = Array.isArray(text) ? text.join("\n") : text;
}

app.registerExtension({
  name: "ideogram4_quant.text",
  beforeRegisterNodeDef(type, definition) {
    if (!HEIGHTS.has(definition.name)) return;
    const before = type.prototype.onExecuted;
    type.prototype.onExecuted = function (output) {
      before?.call(this, output);
      show(this, output);
    };
  },
  nodeCreated: addBox,
  onNodeOutputsUpdated(outputs) { // a workflow opened from the queue's history
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph?.getNodeById(id);
      if (HEIGHTS.has(node?.comfyClass)) show(node, output);
    }
  },
});
