#include "team.h"

#include <pthread.h>

#include <chrono>
#include <system_error>
#include <thread>

namespace teal {
namespace {

// A phase of a small model takes 5 to 50 us, and the system needs about 50 us to wake a thread. So a waiting thread
// spins as long as a phase may last. Then it offers its core to others; then it sleeps, as between two tokens.
constexpr auto SPIN = std::chrono::microseconds(60), OFFER = std::chrono::microseconds(200);
constexpr int TURNS = 32;  // between two looks at the clock

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb");
#endif
}

}  // namespace

Team& Team::instance() {
  static Team* team = new Team;  // never destroyed: its threads outlive every static object
  return *team;
}

void Team::run(Job& job, int64_t threads) {
  int64_t tasks = job.next();
  if (threads <= 1) {
    for (; tasks; tasks = job.next())
      for (int64_t i = 0; i < tasks; ++i) job.task(i);
    return;
  }
  grow(threads - 1);
  job_ = &job;
  width_.store(threads, std::memory_order_relaxed);
  finished_.store(tasks == 0, std::memory_order_relaxed);
  if (tasks) publish(tasks);
  while (true) {
    const uint32_t seen = changes_.load(std::memory_order_acquire);
    if (finished_.load(std::memory_order_acquire)) return;
    if (!take()) wait(seen);
  }
}

// Where the system refuses a thread, those that there are do the work.
void Team::grow(int64_t workers) {
  try {
    for (; workers_ < workers; ++workers_) {
      std::thread thread([this, index = workers_ + 1] { serve(index); });
#if defined(__linux__)
      pthread_setname_np(thread.native_handle(), "teal-step");  // as top shows it
#endif
      thread.detach();
    }
  } catch (const std::system_error&) {
  }
}

void Team::serve(int64_t index) {
  while (true) {
    const uint32_t seen = changes_.load(std::memory_order_acquire);
    if (index >= width_.load(std::memory_order_relaxed) || !take()) wait(seen);
  }
}

// Take a task and do it, and after the last one of a phase what follows. False if there was none.
bool Team::take() {
  uint64_t found = work_.load(std::memory_order_acquire);
  while (const uint64_t untaken = found & UNTAKEN) {
    if (!work_.compare_exchange_weak(found, found - 1, std::memory_order_acq_rel)) continue;
    job_->task(static_cast<int64_t>(untaken) - 1);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) advance();
    return true;
  }
  return false;
}

void Team::advance() {
  int64_t tasks = job_->next();
  for (; tasks == 1; tasks = job_->next()) job_->task(0);
  if (tasks) return publish(tasks);
  finished_.store(true, std::memory_order_release);
  wake();
}

void Team::publish(int64_t tasks) {
  unfinished_.store(tasks, std::memory_order_relaxed);
  const uint64_t phase = work_.load(std::memory_order_relaxed) & ~UNTAKEN;
  work_.store(phase + UNTAKEN + 1 + static_cast<uint64_t>(tasks), std::memory_order_release);
  wake();
}

void Team::wait(uint32_t seen) {
  const auto start = std::chrono::steady_clock::now();
  for (auto waited = start - start; waited < OFFER; waited = std::chrono::steady_clock::now() - start) {
    const bool spin = waited < SPIN;
    for (int turn = 0; turn < TURNS; ++turn) {
      if (changes_.load(std::memory_order_acquire) != seen) return;
      if (spin) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }
  changes_.wait(seen, std::memory_order_acquire);
}

void Team::wake() {
  changes_.fetch_add(1, std::memory_order_release);
  changes_.notify_all();
}

}  // namespace teal
