"""The loss of a large vocabulary: at 200,000 tokens the logits of a batch are the largest thing in a training step [O]."""
import torch


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of `hidden @ weight.T`, of which only a chunk of rows ever exists [O].

    The loss is a sum over tokens, so each chunk's gradients are formed at once, while its logits are at hand. Logits
    are matrix products in autocast's dtype; log-sum-exp, loss and the sum of weight gradients are float32 or better.
    """
    LOGITS_PER_CHUNK = {"cpu": 2**25}     # 128 MB of float32 on a CPU, ...
    DEFAULT_LOGITS = 2**28                # ... 1 GB elsewhere

    @classmethod
    def logits_per_chunk(cls, device: str) -> int:
        return cls.LOGITS_PER_CHUNK.get(device, cls.DEFAULT_LOGITS)

    @staticmethod
    def forward(ctx, hidden, weight, targets):                                  # (N, D), (V, D), (N)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        limit = LinearCrossEntropy.logits_per_chunk(device) // len(weight) or 1
        x_all, w = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        buffer = w.new_empty(min(limit, len(hidden)), len(w))                   # once: the system is slow to give memory
        for start in range(0, len(hidden), limit):
            x, target = x_all[start:start + limit], targets[start:start + limit].unsqueeze(1)
            logits = torch.mm(x, w.T, out=buffer[:len(x)]).to(wide)             # (chunk, V)
            largest, of_target = logits.amax(1, keepdim=True), logits.gather(1, target)
            exponentials = logits.sub_(largest).exp_()                          # in place: logits are the memory
            total = exponentials.sum(1, keepdim=True)
            loss += (total.log() + largest - of_target).sum()
            if not any(ctx.needs_input_grad):
                continue
            probabilities = exponentials.div_(total)
            grad = probabilities.scatter_add_(1, target, -torch.ones_like(total)).div_(len(hidden)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[start:start + limit] = grad @ w
            if grad_weight is not None and dtype == wide:
                grad_weight.addmm_(grad.T, x)
            elif grad_weight is not None:
                grad_weight += grad.T @ x
        ctx.grads = grad_hidden, grad_weight
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad_loss):
        if ctx.grads is None:
            raise RuntimeError("LinearCrossEntropy can go backward only once: its gradients are scaled in place")
        grads, ctx.grads = ctx.grads, None
        return *(g if g is None else g.mul_(grad_loss.to(g.dtype)) for g in grads), None


@torch.compiler.disable      # the one graph break of a training step: the compiler has nothing to fuse across it
def linear_cross_entropy(hidden, weight, targets):
    """Mean of -log softmax(hidden @ weight.T)[target]. (..., D), (V, D), (...) -> scalar, float32 or better"""
    return LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten())
