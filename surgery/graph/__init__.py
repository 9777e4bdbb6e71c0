"""A captured graph: asked, simplified, accounted, lowered; and the nodes that go into it."""
