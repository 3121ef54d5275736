(promoted, outside) => {
  // all nodes but the outside ones become one subgraph, whose inputs are the promoted widgets
  const inner = app.graph.nodes.filter(node => !outside.includes(node.type));
  const { subgraph, node } = app.graph.convertToSubgraph(new Set(inner));
  for (const input of [...subgraph.inputs]) subgraph.removeInput(input);
  for (const [type, name, label] of promoted) {
    const target = subgraph.nodes.find(n => n.type === type);
    const slot = target.inputs.find(input => input.widget?.name === name);
    if (!slot) throw new Error(`${type} has no widget ${name}`);
    const input = subgraph.addInput(label ?? name, String(slot.type)); // Nodes 2.0 shows the name
    input.label = input.name;
    input.connect(slot, target);
  }
  for (const other of [...app.graph.nodes]) if (other !== node) app.graph.remove(other);
  for (const group of [...app.graph.groups]) app.graph.remove(group);
  node.pos = [0, 0];
  node.setSize([420, 460]);
}
