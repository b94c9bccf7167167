#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"

namespace facelt::emulation {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarpLanes = kWarpSize;
constexpr std::size_t kStackBytes = (kAddressSanitizer ? 256 : 64) * 1024;
constexpr std::size_t kSharedLimit = 48 * 1024;
constexpr std::size_t kRaisedSharedLimit = 227 * 1024;
constexpr std::size_t kDynamicAlignment = 16;

enum class Order { kForward, kReverse, kRandom };

struct Schedule {
  Order order = Order::kForward;
  std::uint64_t seed = 0;
};

std::atomic<std::uint64_t> launch_count{0};
std::mutex settings_mutex;
Schedule schedule_setting;
std::unordered_map<std::uintptr_t, std::size_t> dynamic_limits;

Schedule current_schedule() {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  return schedule_setting;
}

/// What was raised for this kernel; 0 if nothing was.
std::size_t dynamic_limit(std::uintptr_t kernel) {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  const auto found = dynamic_limits.find(kernel);
  return found == dynamic_limits.end() ? 0 : found->second;
}

/// splitmix64
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::size_t below(std::size_t bound) {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % bound;
  }

 private:
  std::uint64_t state_;
};

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string text(dim3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

/// "0-31, 64", cut short where a pattern makes many ranges.
std::string ranges(const std::vector<unsigned>& numbers) {
  constexpr int kMaxRanges = 8;
  std::string list;
  int count = 0;
  for (std::size_t first = 0; first < numbers.size();) {
    if (count++ == kMaxRanges)
      return list + ", ... (" + std::to_string(numbers.size()) + " in all)";
    std::size_t last = first;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    if (first > 0) list += ", ";
    list += std::to_string(numbers[first]);
    if (last > first) list += "-" + std::to_string(numbers[last]);
    first = last + 1;
  }
  return list;
}

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

/// Where a thread waits.
struct Stop {
  const char* kind;
  Site site;
  bool of_warp;
};

bool same(const Stop& a, const Stop& b) {
  return a.site.line == b.site.line && a.of_warp == b.of_warp && same_text(a.kind, b.kind) &&
         same_text(a.site.file, b.site.file);
}

/// Where all threads of a group must meet before any goes on.
struct Rendezvous {
  Stop stop;
  unsigned first, size;
  unsigned arrived = 0;
  // Counts modulo 2 the meetings that took place. What threads bring to one meeting is kept apart
  // from the next: a thread may be there before another has read.
  unsigned turn = 0;
};

struct Warp {
  Rendezvous meeting;
  std::uint64_t values[2][kWarpLanes];
};

struct Thread {
  uint3 index;
  unsigned number;
  Fiber* fiber;  // null before the thread starts and after it has returned
  bool returned;
  Stop stop;
};

/// Runs the launches of one host thread. The running fiber itself picks who runs next, so a switch
/// leads from thread to thread, and a thread that never waits leaves its fiber to the next.
class Engine {
 public:
  void run_grid(const Launch& launch);
  int join_block(const char* kind, bool predicate, Site site);
  const std::uint64_t* join_warp(const char* kind, unsigned mask, std::uint64_t value, Site site);
  void* shared_array(const SharedSite& site, std::size_t bytes, std::size_t alignment);
  void* dynamic_shared_array(const SharedSite& site);
  [[noreturn]] void fail(Site site, const std::string& what) const;

 private:
  void check_launch() const;
  void prepare_threads();
  void run_blocks(std::size_t count);
  void run_block(std::size_t number);
  void begin_block();
  void check_shared_bytes(Site site) const;
  [[noreturn]] void report_stuck() const;
  std::string where() const;

  static void fiber_entry();
  [[noreturn]] void run_threads();
  void run_thread();

  void wait(Rendezvous& meeting, const Stop& stop);
  void make_ready(unsigned first, unsigned count);
  Thread* pick();
  void make_current(Thread& thread);
  Fiber& fiber_of(Thread& thread);
  void switch_from(Fiber& fiber, Thread* next);

  const Launch* launch_ = nullptr;
  std::size_t dynamic_limit_ = 0;
  Schedule schedule_;
  Random random_{0};

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Rendezvous block_;
  int block_counts_[2];
  std::size_t static_bytes_ = 0;
  SharedMemory shared_;

  std::vector<unsigned> ready_;  // a stack of thread numbers
  Thread* current_ = nullptr;
  std::exception_ptr failure_;

  Fiber host_;
  Fiber* left_ = nullptr;  // the fiber of the last switch
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_fibers_;
};

thread_local Engine* running_engine = nullptr;

Engine& running(Site site) {
  if (running_engine == nullptr) throw Error(text(site) + ": device code runs outside a launch");
  return *running_engine;
}

[[noreturn]] void refuse(Site launch, const std::string& why) {
  throw Error(text(launch) + ": launch refused: " + why);
}

void Engine::run_grid(const Launch& launch) {
  ++launch_count;
  launch_ = &launch;
  dynamic_limit_ = dynamic_limit(launch.kernel);
  static_bytes_ = 0;
  check_launch();
  schedule_ = current_schedule();
  random_ = Random(schedule_.seed);
  prepare_threads();
  running_thread.block_size = launch.block;
  running_thread.grid_size = launch.grid;
  running_thread.warp_size = kWarpSize;
  run_blocks(std::size_t{launch.grid.x} * launch.grid.y * launch.grid.z);
}

void Engine::check_launch() const {
  const dim3 grid = launch_->grid;
  const dim3 block = launch_->block;
  if (launch_->kernel == 0) refuse(launch_->site, "no kernel");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535u ||
      grid.z > 65535u) {
    refuse(launch_->site,
           "grid " + text(grid) + " is not within (1, 1, 1) and (2147483647, 65535, 65535)");
  }
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.x > kMaxThreads ||
      block.y > kMaxThreads || block.z > 64 || threads > kMaxThreads) {
    refuse(launch_->site, "block " + text(block) + " is not within (1, 1, 1) and (1024, 1024, 64)" +
                              " and 1024 threads");
  }
  if (threads % kWarpLanes != 0) {
    refuse(launch_->site, "block " + text(block) + " has " + std::to_string(threads) +
                              " threads, which is not a multiple of 32");
  }
  check_shared_bytes(launch_->site);
}

void Engine::check_shared_bytes(Site site) const {
  const std::size_t dynamic_bytes = launch_->dynamic_bytes;
  const bool is_raised = dynamic_bytes > 0 && dynamic_bytes <= dynamic_limit_;
  const std::size_t limit = is_raised ? kRaisedSharedLimit : kSharedLimit;
  if (static_bytes_ <= kSharedLimit && dynamic_bytes <= limit - static_bytes_) return;
  refuse(site, std::to_string(static_bytes_) + " bytes of static and " +
                   std::to_string(dynamic_bytes) + " of dynamic shared memory: allowed are " +
                   std::to_string(kSharedLimit) + " static and " + std::to_string(limit) +
                   " in all");
}

void Engine::prepare_threads() {
  const dim3 block = launch_->block;
  const unsigned count = block.x * block.y * block.z;
  threads_.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    threads_[i].number = i;
    threads_[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  warps_.resize(count / kWarpLanes);
  ready_.reserve(kMaxThreads);
  fibers_.reserve(kMaxThreads);
  free_fibers_.reserve(kMaxThreads);
}

void Engine::run_blocks(std::size_t count) {
  std::vector<std::size_t> shuffled(schedule_.order == Order::kRandom ? count : 0);
  std::iota(shuffled.begin(), shuffled.end(), std::size_t{0});
  for (std::size_t i = shuffled.size(); i > 1; --i) {
    std::swap(shuffled[i - 1], shuffled[random_.below(i)]);
  }
  for (std::size_t i = 0; i < count; ++i) {
    run_block(schedule_.order == Order::kForward   ? i
              : schedule_.order == Order::kReverse ? count - 1 - i
                                                   : shuffled[i]);
  }
}

void Engine::run_block(std::size_t number) {
  const dim3& grid = launch_->grid;
  running_thread.block = {static_cast<unsigned>(number % grid.x),
                          static_cast<unsigned>(number / grid.x % grid.y),
                          static_cast<unsigned>(number / grid.x / grid.y)};
  begin_block();
  switch_from(host_, pick());
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  const auto returned = [](const Thread& thread) { return thread.returned; };
  if (!std::all_of(threads_.begin(), threads_.end(), returned)) report_stuck();
  shared_.check_guards(where());
}

/// Whatever the block before left undone is forgotten.
void Engine::begin_block() {
  for (Thread& thread : threads_) {
    thread.fiber = nullptr;
    thread.returned = false;
  }
  for (unsigned i = 0; i < warps_.size(); ++i) {
    warps_[i].meeting = Rendezvous{{}, i * kWarpLanes, kWarpLanes};
  }
  block_ = Rendezvous{{}, 0, static_cast<unsigned>(threads_.size())};
  block_counts_[0] = block_counts_[1] = 0;
  static_bytes_ = 0;
  shared_.clear();
  if (free_fibers_.size() != fibers_.size()) {
    free_fibers_.clear();
    for (const auto& fiber : fibers_) free_fibers_.push_back(fiber.get());
  }
  ready_.clear();
  make_ready(0, static_cast<unsigned>(threads_.size()));
}

void Engine::make_ready(unsigned first, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    ready_.push_back(schedule_.order == Order::kForward ? first + count - 1 - i : first + i);
  }
}

/// The thread to run next; null if none can.
Thread* Engine::pick() {
  if (ready_.empty()) return nullptr;
  if (schedule_.order == Order::kRandom) {
    std::swap(ready_.back(), ready_[random_.below(ready_.size())]);
  }
  Thread& next = threads_[ready_.back()];
  ready_.pop_back();
  return &next;
}

void Engine::make_current(Thread& thread) {
  current_ = &thread;
  running_thread.thread = thread.index;
  running_thread.lane = static_cast<int>(thread.number % kWarpLanes);
}

Fiber& Engine::fiber_of(Thread& thread) {
  if (thread.fiber != nullptr) return *thread.fiber;
  if (free_fibers_.empty()) {
    fibers_.push_back(std::make_unique<Fiber>(kStackBytes));
    free_fibers_.push_back(fibers_.back().get());
  }
  thread.fiber = free_fibers_.back();
  free_fibers_.pop_back();
  thread.fiber->restart(fiber_entry);
  return *thread.fiber;
}

/// To the host if there is no next thread.
void Engine::switch_from(Fiber& fiber, Thread* next) {
  Fiber& target = next != nullptr ? fiber_of(*next) : host_;
  if (next != nullptr) make_current(*next);
  left_ = &fiber;
  fiber.switch_to(target);
}

void Engine::fiber_entry() { running_engine->run_threads(); }

void Engine::run_threads() {
  Fiber& fiber = *current_->fiber;
  fiber.entered_from(*left_);
  for (;;) {
    run_thread();
    Thread* next = failure_ ? nullptr : pick();
    if (next != nullptr) make_current(*next);
    if (next != nullptr && next->fiber == nullptr) {
      next->fiber = &fiber;
      continue;
    }
    free_fibers_.push_back(&fiber);
    fiber.leave_to(next != nullptr ? *next->fiber : host_);
  }
}

void Engine::run_thread() {
  try {
    launch_->run_thread(launch_->call);
  } catch (...) {
    failure_ = std::current_exception();
  }
  current_->fiber = nullptr;
  current_->returned = true;
}

/// A thread that comes to another place than the first is not counted: the meeting then never
/// takes place, and is reported when no thread can run.
void Engine::wait(Rendezvous& meeting, const Stop& stop) {
  Thread& self = *current_;
  self.stop = stop;
  if (meeting.arrived == 0) meeting.stop = stop;
  if (same(meeting.stop, stop)) ++meeting.arrived;
  if (meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    meeting.turn ^= 1;
    make_ready(meeting.first, meeting.size);
  }
  Thread* next = pick();
  if (next != &self) switch_from(*self.fiber, next);
}

int Engine::join_block(const char* kind, bool predicate, Site site) {
  int& count = block_counts_[block_.turn];
  count += predicate;
  // With the last arrival all have read the count of the meeting before, whose place is next used.
  if (block_.arrived + 1 == block_.size) block_counts_[block_.turn ^ 1] = 0;
  wait(block_, {kind, site, false});
  return count;
}

const std::uint64_t* Engine::join_warp(const char* kind, unsigned mask, std::uint64_t value,
                                       Site site) {
  if (mask != kFullMask) {
    char digits[16];
    std::snprintf(digits, sizeof digits, "0x%08x", mask);
    fail(site, std::string(kind) + " with mask " + digits + "; only the full mask is allowed");
  }
  Warp& warp = warps_[current_->number / kWarpLanes];
  std::uint64_t* const values = warp.values[warp.meeting.turn];
  values[running_thread.lane] = value;
  wait(warp.meeting, {kind, site, true});
  return values;
}

void* Engine::shared_array(const SharedSite& site, std::size_t bytes, std::size_t alignment) {
  if (void* const found = shared_.find(&site)) return found;
  static_bytes_ += bytes;
  check_shared_bytes(site.site);
  void* const array = shared_.allocate(&site, site, bytes, alignment);
  if (array == nullptr) fail(site.site, "too many shared arrays");
  return array;
}

/// One array for all declarations, as in CUDA; the first names it.
void* Engine::dynamic_shared_array(const SharedSite& site) {
  if (void* const found = shared_.find(this)) return found;
  void* const array = shared_.allocate(this, site, launch_->dynamic_bytes, kDynamicAlignment);
  if (array == nullptr) fail(site.site, "too many shared arrays");
  return array;
}

std::string Engine::where() const {
  return ", in block " + text(running_thread.block) + " of the kernel launched at " +
         text(launch_->site);
}

void Engine::fail(Site site, const std::string& what) const {
  throw Error(text(site) + ": " + what + ", by thread " + text(current_->index) + where());
}

void Engine::report_stuck() const {
  std::vector<unsigned> returned;
  std::vector<std::pair<Stop, std::vector<unsigned>>> groups;
  for (const Thread& thread : threads_) {
    if (thread.returned) {
      returned.push_back(thread.number);
      continue;
    }
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const auto& g) { return same(g.first, thread.stop); });
    if (group == groups.end()) group = groups.insert(group, {thread.stop, {}});
    group->second.push_back(thread.number);
  }
  // A divided warp also keeps the block's barrier waiting: it comes first, being the cause.
  std::stable_partition(groups.begin(), groups.end(),
                        [](const auto& group) { return group.first.of_warp; });
  const Stop& stop = groups.front().first;
  std::string message = text(stop.site) + ": " + stop.kind + " not reached by all threads of its " +
                        (stop.of_warp ? "warp" : "block") + ":";
  for (const auto& [place, numbers] : groups) {
    message +=
        " threads " + ranges(numbers) + " wait at " + place.kind + " (" + text(place.site) + ");";
  }
  if (!returned.empty()) message += " threads " + ranges(returned) + " have returned;";
  message.back() = ',';
  throw Error(message + where().substr(1));
}

}  // namespace

std::uint64_t launches() { return launch_count; }

void set_schedule(std::string_view name, std::uint64_t seed) {
  Schedule schedule{Order::kForward, seed};
  if (name == "reverse") {
    schedule.order = Order::kReverse;
  } else if (name == "random") {
    schedule.order = Order::kRandom;
  } else if (name != "forward") {
    throw Error("schedule '" + std::string(name) + "' is none of forward, reverse and random");
  }
  const std::lock_guard<std::mutex> lock(settings_mutex);
  schedule_setting = schedule;
}

void run_grid(const Launch& launch) {
  static thread_local Engine engine;
  if (running_engine != nullptr) running_engine->fail(launch.site, "launch from device code");
  struct Running {
    Running() { running_engine = &engine; }
    ~Running() { running_engine = nullptr; }
  } running;
  engine.run_grid(launch);
}

void raise_dynamic_limit(std::uintptr_t kernel, std::size_t bytes, Site site) {
  if (bytes > kRaisedSharedLimit) {
    throw Error(text(site) + ": " + std::to_string(bytes) +
                " bytes of dynamic shared memory are more than any kernel may have, 232448");
  }
  const std::lock_guard<std::mutex> lock(settings_mutex);
  dynamic_limits[kernel] = bytes;
}

void fail(Site site, const char* what) {
  if (running_engine != nullptr) running_engine->fail(site, what);
  throw Error(text(site) + ": " + what);
}

int join_block(const char* kind, bool predicate, Site site) {
  return running(site).join_block(kind, predicate, site);
}

const std::uint64_t* join_warp(const char* kind, unsigned mask, std::uint64_t value, Site site) {
  return running(site).join_warp(kind, mask, value, site);
}

void* shared_array(const SharedSite& site, std::size_t bytes, std::size_t alignment) {
  return running(site.site).shared_array(site, bytes, alignment);
}

void* dynamic_shared_array(const SharedSite& site) {
  return running(site.site).dynamic_shared_array(site);
}

}  // namespace facelt::emulation
