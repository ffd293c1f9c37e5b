// A small team of threads that runs the phases of a job, one after the other.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace teal {

// Work in phases: within one, tasks run in any order on any thread.
class Job {
 public:
  virtual void task(int64_t index) = 0;
  // What must be done alone between two phases; returns how many tasks the next one has, 0 at the end.
  virtual int64_t next() = 0;

 protected:
  ~Job() = default;
};

// The process's one team. A phase ends when its tasks are done, not when all threads have arrived. So a thread that the
// system has paused holds nobody up, unless within a task. Whoever finishes the last task prepares the next phase.
//
// work_ is the phase's number and, in its last bits, how many tasks nobody has taken. A task is taken by an exchange
// that fails if either has changed. So a thread that comes late takes nothing of a phase that it does not know.
//
// Threads are made when first needed, and never end: the process's exit takes them along. In a forked child there are
// none, and the caller does all of the work.
class Team {
 public:
  static Team& instance();

  // Held by the caller of run, for the memory that its job uses.
  std::unique_lock<std::mutex> hold() { return std::unique_lock(mutex_); }

  // Run a job on so many threads, this one among them. The caller must hold the team.
  void run(Job& job, int64_t threads);

 private:
  static constexpr uint64_t UNTAKEN = (1 << 20) - 1;

  void grow(int64_t workers);
  void serve(int64_t index);
  bool take();
  void advance();
  void publish(int64_t tasks);
  void wait(uint32_t seen);
  void wake();

  std::mutex mutex_;
  int64_t workers_ = 0;
  Job* job_ = nullptr;
  std::atomic<int64_t> width_{1};  // threads of the job at hand
  alignas(64) std::atomic<uint64_t> work_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};  // tasks of the phase
  alignas(64) std::atomic<uint32_t> changes_{0};    // of what a waiting thread looks at
  std::atomic<bool> finished_{true};
};

}  // namespace teal
