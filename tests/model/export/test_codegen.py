"""What is written as a cell's code, where sizes and what follows from the batch meet."""

import torch
from torch import Tensor, nn

import stagewise


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, h: Tensor, source: Tensor, to: Tensor) -> Tensor:
        message = self.message(torch.cat([h[source], h[to]], -1)).relu()
        gathered = torch.zeros_like(h).index_add(0, to, message)
        return self.update(torch.cat([h, gathered], -1)).tanh()


class GraphNetwork(nn.Module):
    """The samples' nodes lie in a row: how many messages there are is a size of the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        samples, count, _ = nodes.shape
        offset = (torch.arange(samples) * count)[:, None]
        source, to = ((edges[..., end] + offset).flatten() for end in (0, 1))
        h = self.embed(nodes.flatten(0, 1))
        for layer in self.layers:
            h = layer(h, source, to)
        return self.head(h.view(samples, count, -1).mean(1))


def test_sizes_of_what_follows_from_the_batch_reach_every_cell() -> None:
    torch.manual_seed(0)
    model = GraphNetwork()

    def batch(samples: int, nodes: int, edges: int) -> tuple[Tensor, Tensor]:
        ends = torch.randint(0, nodes, (samples, edges, 2))
        return torch.randn(samples, nodes, 4), ends

    captured = stagewise.capture(model, *batch(8, 5, 7))
    assert [cell.name for cell in captured.chain][1:] == ["layers.0", "layers.1", "layers.2"]
    for sizes in ((8, 5, 7), (1, 5, 7), (3, 6, 9)):
        given = batch(*sizes)
        torch.testing.assert_close(captured(*given), model(*given))
