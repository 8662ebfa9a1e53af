# SPDX-License-Identifier: Apache-2.0
"""The shortest PyTorch that does an op's work on dense batches: what people write by hand.

Our references also handle masks, bans and bad ids, so they are slower; a ratio "to naive" is to the
faster of the two. Arguments are those of the op. An op that is not in `EAGER` has its reference.
"""

import torch
import torch.nn.functional as F

from benchmarks.peers import logprobs_of


def chosen(logits, actions):
    """Log-probs of the actions, [..., T], in float32 or wider."""
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return logprobs_of(rows, actions.reshape(-1)).view(actions.shape)


def log_softmax(logits):
    return torch.log_softmax(logits, -1, torch.promote_types(logits.dtype, torch.float32))


def token_log_ratios(logits, ref_logits, actions):
    return chosen(logits, actions) - chosen(ref_logits, actions)


def token_stats(logits, actions, ref_logits):
    a, policy, ref = actions[..., None], log_softmax(logits), log_softmax(ref_logits)
    p = policy.exp()
    entropy, kl = -(p * policy).sum(-1), (p * (policy - ref)).sum(-1)
    return policy.gather(-1, a)[..., 0], entropy, ref.gather(-1, a)[..., 0], kl


def q_values(logits, ref_logits, values, *, tau):
    return tau * (log_softmax(logits) - log_softmax(ref_logits)) + values[..., None]


def boltzmann_values(q, ref_logits, *, tau):
    return tau * torch.logsumexp(log_softmax(ref_logits) + q / tau, -1)


def loop(rewards, values, mask, baseline, gamma, lam):
    """The loop over time of PPO trainers; inactive tokens pass value and advantage on."""
    after, advantage, out = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * after - baseline[:, t]
        active = mask[:, t]
        advantage = torch.where(active, delta + gamma * lam * advantage, advantage)
        after = torch.where(active, values[:, t], after)
        out.append(advantage)
    return torch.where(mask, torch.stack(out[::-1], 1), 0.0)


def lambda_returns(log_ratios, values, rewards, *, mask, tau, gamma, lam, alpha):
    q = torch.where(mask, tau * log_ratios + values, 0.0)
    advantages = loop(rewards, values, mask, q, gamma, lam)
    return q, advantages, q + alpha * advantages


def gae(rewards, values, *, mask, gamma, lam):
    advantages = loop(rewards, values, mask, values, gamma, lam)
    return advantages, torch.where(mask, advantages + values, 0.0)


def klq_targets(logits, actions, values, rewards, ref_logits, *, tau, gamma, lam, alpha):
    policy, ref = chosen(logits, actions), chosen(ref_logits, actions)
    mask = torch.ones_like(actions, dtype=torch.bool)
    how = {"mask": mask, "tau": tau, "gamma": gamma, "lam": lam, "alpha": alpha}
    values, rewards = values.to(policy.dtype), rewards.to(policy.dtype)
    return policy, ref, policy - ref, *lambda_returns(policy - ref, values, rewards, **how)


def squared(logprobs, values, ref_logprobs, returns, tau):
    return (tau * (logprobs - ref_logprobs) + values - returns).square().sum()


def klq_loss(logits, actions, values, *, ref_logprobs, returns, tau, normalizer):
    loss = squared(chosen(logits, actions), values, ref_logprobs, returns, tau)
    return loss / normalizer


def linear_token_logprobs(hidden, weight, actions):
    return chosen(F.linear(hidden, weight), actions)


def linear_token_stats(hidden, weight, actions):
    policy = log_softmax(F.linear(hidden, weight))
    return policy.gather(-1, actions[..., None])[..., 0], -(policy.exp() * policy).sum(-1)


def linear_klq_loss(hidden, weight, actions, values, *, ref_logprobs, returns, tau, normalizer):
    logprobs = linear_token_logprobs(hidden, weight, actions)
    return squared(logprobs, values, ref_logprobs, returns, tau) / normalizer


EAGER = {
    "token_logprobs": chosen,
    **{
        f.__name__: f
        for f in (
            *(token_log_ratios, token_stats, q_values, boltzmann_values, lambda_returns, gae),
            *(klq_targets, klq_loss, linear_token_logprobs, linear_token_stats, linear_klq_loss),
        )
    },
}
