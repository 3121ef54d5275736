// The default look draws every setting of a node at once. This keeps those that are marked as
// advanced behind a button there, as Nodes 2.0 does with a button of its own.
import { app } from "../../scripts/app.js";

const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets";

// One that is connected stays: its link would end in nothing.
function connected(node, widget) {
  return node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
}

function aside(node, widget) {
  const always = app.extensionManager?.setting.get(ALWAYS);
  return !node.showAdvanced && !always && !connected(node, widget);
}

// The page's canvas asks `advanced` when it draws and measures, `hidden` when it places.
function fold(node, widget) {
  let hidden = widget.hidden ?? false; // as others set it
  Object.defineProperty(widget, "advanced", { configurable: true, get: () => aside(node, widget) });
  Object.defineProperty(widget, "hidden", {
    configurable: true,
    get: () => hidden || (!LiteGraph.vueNodesMode && aside(node, widget)),
    set: (value) => (hidden = value),
  });
}

function toggle(node) {
  const before = node.computeSize()[1];
  node.showAdvanced = !node.showAdvanced;
  const [width, height] = node.size;
  node.setSize([width, height + node.computeSize()[1] - before]);
  node.setDirtyCanvas(true, true);
}

function addButton(node) {
  const options = { serialize: false, canvasOnly: true };
  const button = node.addWidget("button", "advanced", null, () => toggle(node), options);
  button.serialize = false;
  const report = node.widgets.findIndex((widget) => widget.name === "shown");
  if (report >= 0) node.widgets.splice(report, 0, node.widgets.pop()); // in the same place whichever came first
  Object.defineProperty(button, "label", {
    configurable: true,
    get: () => (node.showAdvanced ? "Hide advanced inputs" : "Show advanced inputs"),
  });
}

app.registerExtension({
  name: "ideogram4_quant.advanced",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Ideogram4Quant")) return;
    const settings = (node.widgets ?? []).filter((widget) => widget.options?.advanced);
    for (const widget of settings) fold(node, widget);
    if (settings.length) addButton(node);
  },
});
