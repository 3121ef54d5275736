async (columns, links) => {
  const GAP = 80, BELOW = 64, TITLE = 30, PADDING = 20, HEADER = 50;
  const shape = () => app.graph.nodes.map(node => node.size.join()).join();
  const settle = async () => { // nodes grow as they render
    for (let before = null; before !== shape();) {
      before = shape();
      await new Promise(done => setTimeout(done, 1500));
    }
  };
  const named = {};
  const make = (spec, width) => {
    const node = LiteGraph.createNode(spec.type);
    if (!node) throw new Error('no node type ' + spec.type);
    app.graph.add(node);
    node.title = spec.title ?? node.title;
    for (const [name, value] of Object.entries(spec.widgets)) {
      const widget = node.widgets.find(w => w.name === name);
      if (!widget) throw new Error(spec.type + ' has no widget ' + name);
      widget.value = value;
      widget.callback?.(value);
    }
    if (spec.models.length) node.properties.models = spec.models;
    if (spec.color) { node.color = spec.color; node.bgcolor = spec.color; }
    node.setSize([width, Math.max(spec.height, node.computeSize()[1])]);
    named[spec.name] = node;
  };
  const arrange = () => {
    let x = 0;
    for (const column of columns) {
      let y = HEADER + TITLE;
      for (const { name } of column.nodes) {
        const node = named[name];
        node.pos = [x + PADDING, y];
        y += node.size[1] + BELOW;
      }
      const group = new LiteGraph.LGraphGroup(column.title);
      group.color = column.color;
      group.pos = [x, 0];
      group.size = [column.width + 2 * PADDING, y - BELOW + PADDING];
      app.graph.add(group);
      x += column.width + 2 * PADDING + GAP / 2;
    }
  };
  const connect = ([from, output, to, input]) => {
    const source = named[from], target = named[to];
    const slot = source.outputs.findIndex(o => o.name === output);
    const place = target.inputs.findIndex(i => i.name === input);
    if (slot < 0 || place < 0) throw new Error(`no link ${from}.${output} -> ${to}.${input}`);
    source.connect(slot, target, place);
  };
  for (const column of columns) for (const spec of column.nodes) make(spec, column.width);
  links.forEach(connect);
  await settle();
  arrange();
  await settle();
}
