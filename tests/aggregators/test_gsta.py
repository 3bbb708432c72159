import pytest
import torch
from torch.nn import functional as F

from temporal_agg import create_aggregator
from temporal_agg.aggregators.gsta import GSTA, ConvLSTM

B, T, C, CH, H, W = 2, 5, 6, 8, 4, 3


def maps(frames=T, size=(H, W), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, frames, C, *size, generator=g, dtype=torch.float64)


def gsta():
    torch.manual_seed(0)
    return GSTA(C, hidden_features=CH).double()


def literal_convlstm(lstm, x):
    """Frame by frame, one convolution over the concatenation [x_t, h]."""
    weight = torch.cat([lstm.input.weight, lstm.recurrent.weight], 1)
    h = c = torch.zeros(B, CH, *x.shape[3:], dtype=x.dtype)
    states = []
    for t in range(x.shape[1]):
        gates = F.conv2d(torch.cat([x[:, t], h], 1), weight, lstm.input.bias, padding=1)
        i, f, g, o = (gates[:, k * CH : (k + 1) * CH] for k in range(4))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return torch.stack(states, 1)


def literal_gsta(m, x):
    """Equations 6 to 8, sum by sum."""
    L_H, L_W = x.shape[3:]
    hidden = literal_convlstm(m.lstm, x)
    embeddings, weights = [], []
    for b in range(B):
        h = []
        for i in range(T):  # Eq. 6
            h.append(sum(hidden[b, i, :, k, j] for k in range(L_H) for j in range(L_W)) / (L_H * L_W))
        scores = [m.score.weight @ (m.squeeze.weight @ h[i] + m.squeeze.bias).clamp(min=0) for i in range(T)]
        total = sum(s.exp() for s in scores)
        K = [s.exp() / total for s in scores]  # Eq. 7
        residual = sum(x[b, i, :, k, j] for i in range(T) for k in range(L_H) for j in range(L_W)) / (L_H * L_W * T)
        embeddings.append(m.project.weight @ sum(K[i] * h[i] for i in range(T)) + residual)  # Eq. 8
        weights.append(torch.cat(K))
    return torch.stack(embeddings), torch.stack(weights)


def gradients(output, module, x):
    target = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sin().sum()
    return torch.autograd.grad(target, [x, *module.parameters()])


def test_convlstm_equals_the_loop_over_concatenated_inputs():
    lstm, x = gsta().lstm, maps().requires_grad_()
    got, (h, _) = lstm(x)
    want = literal_convlstm(lstm, x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(got, lstm, x), gradients(want, lstm, x), rtol=1e-9, atol=1e-9)
    assert torch.equal(h, got[:, -1])


def test_convlstm_on_single_pixels_is_torchs_lstm():
    lstm, x = gsta().lstm, maps(size=(1, 1))
    torch.nn.init.normal_(lstm.input.bias)
    other = torch.nn.LSTM(C, CH, batch_first=True).double()
    with torch.no_grad():  # of a 3x3 kernel only the centre meets the pixel
        other.weight_ih_l0.copy_(lstm.input.weight[:, :, 1, 1])
        other.weight_hh_l0.copy_(lstm.recurrent.weight[:, :, 1, 1])
        other.bias_ih_l0.copy_(lstm.input.bias)
        other.bias_hh_l0.zero_()
    hidden, (h, c) = lstm(x)
    want, (want_h, want_c) = other(x.flatten(2))
    torch.testing.assert_close(hidden.flatten(2), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((h.flatten(1), c.flatten(1)), (want_h[0], want_c[0]), rtol=1e-9, atol=1e-9)


def test_convlstm_state_passes_over_padding():
    lstm, x = gsta().lstm, maps()
    mask = torch.tensor([[True, True, False, True, False], [False, False, False, False, True]])
    hidden, (h, c) = lstm(x, mask=mask)
    for b in range(B):
        alone, (alone_h, alone_c) = lstm(x[b : b + 1, mask[b]])
        torch.testing.assert_close(hidden[b, mask[b]], alone[0])
        torch.testing.assert_close((h[b], c[b]), (alone_h[0], alone_c[0]))


def test_convlstm_starts_with_an_open_forget_gate():
    bias = ConvLSTM(3, 2).input.bias.tolist()
    assert bias == [0, 0, 1, 1, 0, 0, 0, 0]


def test_gsta_equals_the_equations():
    m, x = gsta(), maps().requires_grad_()
    details = m(x, return_details=True)
    embedding, weights = literal_gsta(m, x)
    torch.testing.assert_close(details.embedding, embedding, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(details.frame_weights, weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(details.embedding, m, x), gradients(embedding, m, x), rtol=1e-9, atol=1e-9)
    assert details.supervised["features"] is x


@pytest.mark.parametrize("lengths", [(5,), (1, 3, 1), (1,) * 5])
def test_a_stream_has_the_gradients_of_one_pass(lengths):
    m, x = gsta(), maps().requires_grad_()
    whole, state = m(x), m.begin(B)
    for piece in x.split(lengths, 1):
        state = m.update(state, piece)
    parts = m.read(state).embedding
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(parts, m, x), gradients(whole, m, x), rtol=1e-9, atol=1e-9)


def test_half_precision_keeps_the_cell_in_float32():
    m = gsta().bfloat16()
    details = m(maps().bfloat16(), return_details=True)
    assert details.embedding.dtype == torch.bfloat16
    hidden, state = m.lstm(maps().bfloat16())
    assert hidden.dtype == torch.bfloat16
    assert {s.dtype for s in state} == {torch.float32}


def test_errors():
    m = gsta()
    with pytest.raises(ValueError, match="as before"):
        m.update(m.update(m.begin(B), maps()), maps()[..., 1:])
    with pytest.raises(TypeError, match="hidden_features"):
        create_aggregator("gsta", C, hidden=8)


def test_a_zero_start_is_the_mean_of_the_maps():
    m = create_aggregator("gsta", C, hidden_features=8, start="zero")
    x = maps().float()
    torch.testing.assert_close(m(x), x.mean((1, 3, 4)))
    m(x).square().sum().backward()
    assert m.project.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="'random' or 'zero', got 'one'"):
        create_aggregator("gsta", C, start="one")
