"""A recurrent PPO policy: act with `step()`, learn from whole rollouts with `reset=`.

    python examples/ppo_policy.py

A rollout of T steps in B environments cuts right through episodes. The usual way to train a recurrent policy on it is
a Python loop that zeroes the state wherever an episode ended. Here that is an argument: `reset` (T, B) is True at the
first step of an episode, and one call runs the whole rollout, giving the very numbers that acting gave.

The task needs memory: a cue, left or right, is shown at the first step of an episode only, and must be answered at
its last. Without memory the reward is 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import normwise

OBSERVATION, ACTIONS = 3, 2


class Corridors:
    """B corridors of random length: the cue (+1 or -1) at the start, and at the end a light that asks for it."""

    def __init__(self, batch: int) -> None:
        self.cue = torch.zeros(batch)
        self.left = torch.zeros(batch, dtype=torch.long)  # steps left in the episode
        self.start = torch.ones(batch, dtype=torch.bool)

    def observe(self) -> tuple[Tensor, Tensor]:
        """(observation (B, 3), whether this is an episode's first step (B,)); begins new episodes where one ended."""
        self.cue = torch.where(self.start, torch.randint(0, 2, self.cue.shape) * 2.0 - 1.0, self.cue)
        self.left = torch.where(self.start, torch.randint(2, 7, self.left.shape), self.left)
        asking = self.left == 0
        return torch.stack([self.cue * self.start, asking.float(), torch.randn_like(self.cue)], -1), self.start

    def act(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """(reward (B,), whether the episode is over (B,))."""
        asking = self.left == 0
        reward = (asking & (action == (self.cue > 0).long())).float()
        self.left, self.start = self.left - 1, asking
        return reward, asking


class Policy(nn.Module):
    """Logits of the actions and a value, from all observations since the episode began."""

    def __init__(self, hidden_size: int = 32) -> None:
        super().__init__()
        self.lstm = normwise.LSTM(OBSERVATION, hidden_size)
        self.actor = nn.Linear(hidden_size, ACTIONS)
        self.critic = nn.Linear(hidden_size, 1)

    def forward(self, observations: Tensor, state: object, reset: Tensor) -> tuple[Categorical, Tensor]:
        """A whole rollout (T, B, 3), from the state in which it began."""
        features, _ = self.lstm(observations, state, reset=reset)
        return Categorical(logits=self.actor(features)), self.critic(features).squeeze(-1)

    def step(self, observation: Tensor, state: object, reset: Tensor) -> tuple[Categorical, Tensor, object]:
        """One step in every environment."""
        features, state = self.lstm.step(observation, state, reset=reset)
        return Categorical(logits=self.actor(features)), self.critic(features).squeeze(-1), state


@dataclass
class Rollout:
    """T steps of B environments; `state` is the policy's before the first."""

    state: object
    observations: Tensor
    reset: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    score: float  # mean reward of the episodes that ended


@torch.no_grad()
def play(policy: Policy, corridors: Corridors, state: object, steps: int) -> tuple[Rollout, object]:
    """Act for `steps` steps; advantages by GAE (discount 0.95, lambda 0.9)."""
    before, seen = state, []
    for _ in range(steps):
        observation, start = corridors.observe()
        actions, value, state = policy.step(observation, state, start)
        action = actions.sample()
        reward, over = corridors.act(action)
        seen.append((observation, start, action, actions.log_prob(action), value, reward, over))
    observations, reset, acted, log_probs, values, rewards, over = (torch.stack(s) for s in zip(*seen, strict=True))
    advantages, carried, following = torch.zeros_like(values), torch.zeros_like(values[0]), values[-1]
    for t in reversed(range(steps)):
        going_on = (~over[t]).float()
        carried = rewards[t] + 0.95 * following * going_on - values[t] + 0.95 * 0.9 * going_on * carried
        advantages[t], following = carried, values[t]
    score = (rewards.sum() / over.sum()).item()
    return Rollout(before, observations, reset, acted, log_probs, advantages, advantages + values, score), state


def learn(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, epochs: int = 4) -> float:
    """PPO's clipped objective on a rollout. Returns how far the first probability ratio is from 1: rounding only."""
    advantages = (rollout.advantages - rollout.advantages.mean()) / (rollout.advantages.std() + 1e-6)
    drift = 0.0
    for epoch in range(epochs):
        actions, values = policy(rollout.observations, rollout.state, rollout.reset)
        ratio = torch.exp(actions.log_prob(rollout.actions) - rollout.log_probs)
        if epoch == 0:
            drift = (ratio - 1).abs().max().item()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        loss = -gain + 0.5 * (values - rollout.returns).square().mean() - 0.01 * actions.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
    return drift


def main(updates: int = 40, steps: int = 32, batch: int = 64) -> tuple[float, float]:
    """Train: (reward an episode at the end, largest drift of a first ratio from 1)."""
    torch.manual_seed(0)
    policy, corridors, state = Policy(), Corridors(batch), None
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    score, drift = 0.0, 0.0
    for update in range(updates):
        rollout, state = play(policy, corridors, state, steps)
        drift = max(drift, learn(policy, optimizer, rollout))
        score = rollout.score
        if update == 0 or update % 10 == 9:
            print(f"update {update + 1:3}: reward an episode {score:.2f}")
    print(f"acting and learning saw the same probabilities up to {drift:.1e}")
    return score, drift


if __name__ == "__main__":
    main()
