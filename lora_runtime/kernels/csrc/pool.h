// Threads that share the work of one op.
//
// Not OpenMP's: its threads wait either for milliseconds, in which they keep a core from everybody
// else, or, as soon as a second thread of the program has used OpenMP, for a microsecond, after
// which every op of a step pays for waking them. These look for the next op of a step for a while
// that is longer than the gap between two ops and shorter than that between two steps.

class Pool {
 public:
  static Pool& get() {
    static std::once_flag once;
    std::call_once(once, [] {
      instance() = new Pool;  // never deleted: its threads wait to the end of the process
      pthread_atfork(nullptr, nullptr, [] { instance() = new Pool; });  // a child has no threads
    });
    return *instance();
  }

  // Call body(begin, end) for parts of 0 to count, `grain` long, on up to num_threads threads: this
  // one and those that come in time. Alone where the others are at work for another thread, and with
  // fewer where the system gives no more. A negative number: that many of torch's threads.
  // Each thread begins with a share of its own, whose parts follow one another: two cores that read
  // far apart get more out of the memory than two that read close to each other.
  template <class Body>
  void run(long count, long grain, int num_threads, const Body& body) {
    if (num_threads < 0) return run_beside_torch(count, grain, -num_threads, body);
    num_threads = int(std::min<long>(num_threads, (count + grain - 1) / grain));
    std::unique_lock<std::mutex> hold(one_job_, std::defer_lock);
    if (num_threads < 2 || !hold.try_lock()) {
      if (count > 0) body(0, count);
      return;
    }
    while (num_workers_ < num_threads - 1 && start_worker()) {}
    callers_core_.store(this_core(), std::memory_order_relaxed);
    caller_.store(this_thread(), std::memory_order_relaxed);
    call_ = [](const void* own, long begin, long end) { (*static_cast<const Body*>(own))(begin, end); };
    body_ = &body, grain_ = grain, max_helpers_ = num_threads - 1;
    share_out(count, num_threads);
    {
      std::lock_guard<std::mutex> guard(sleep_);
      state_.store(((state_.load() >> 32) + 1) << 32 | OPEN);
    }
    if (num_asleep_.load() > 0) wake_.notify_all();
    work(0);
    // Nobody is waited for who has not begun: a thread that sleeps, or has lost its core, is left out.
    state_.fetch_and(~OPEN);
    for (long spins = 0; state_.load(std::memory_order_acquire) & HELPERS; spins++) pause(spins);
  }

 private:
  static constexpr auto PATIENCE = std::chrono::microseconds(200), REST = std::chrono::milliseconds(5);
  // How long a helper computes before it yields. Linux keeps a thread that wakes waiting for about
  // 700 µs, then gives it this core, within a part if need be. Shorter turns leave the core to
  // whoever computes beside: who yields gives up the rest of its slice.
  static constexpr auto TURN = std::chrono::microseconds(500);
  // Of `state_`: the job's number in the upper half, whether it may be joined, and who is at it.
  static constexpr uint64_t OPEN = 1u << 31, HELPERS = OPEN - 1;

  // After an op of torch its threads look for another for milliseconds and have the cores: between
  // torch's ops they do the work. Without libgomp this thread does it.
  template <class Body>
  static void run_beside_torch(long count, long grain, int num_threads, const Body& body) {
    if (num_threads < 2 || !GOMP_parallel) return body(0, count);
    struct Job {
      const Body& body;
      long count, grain;
      std::atomic<long> next{0};
    } job{body, count, grain};
    GOMP_parallel(
        [](void* own) {
          Job& job = *static_cast<Job*>(own);
          for (long begin; (begin = job.next.fetch_add(job.grain)) < job.count;)
            job.body(begin, std::min(begin + job.grain, job.count));
        },
        &job, num_threads, 0);
  }

  static Pool*& instance() {
    static Pool* pool = nullptr;
    return pool;
  }

  static void pause(long spins) {
#ifdef HAS_VARIANTS
    if (spins % 1024 != 1023) return _mm_pause();
#endif
    std::this_thread::yield();  // who is waited for may have lost its core
  }

  // -1 where the system does not say.
  static int this_core() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
  }

  // 0 where the system has no number for it. Asked for anew: a child of a fork has another.
  static int this_thread() {
#ifdef __linux__
    return int(syscall(SYS_gettid));
#else
    return 0;
#endif
  }

  // Whether this helper has taken the core of the thread that it should help, as happens where
  // others keep the rest of the cores busy: both would wait for each other in turns.
  bool is_in_the_way() const {
    const int core = this_core();
    return core >= 0 && core == callers_core_.load(std::memory_order_relaxed);
  }

  // Take another of the cores that the caller may use, though others are busy there: left alone,
  // the system wakes a thread where it slept. A caller that may use more cores later gives them to its
  // helpers when one is in its way again. False where there is no other core.
  bool made_way() const {
#ifdef __linux__
    cpu_set_t cores;
    if (sched_getaffinity(caller_.load(std::memory_order_relaxed), sizeof cores, &cores)) return false;
    CPU_CLR(callers_core_.load(std::memory_order_relaxed), &cores);
    return CPU_COUNT(&cores) > 0 && !sched_setaffinity(0, sizeof cores, &cores) && !is_in_the_way();
#else
    return false;
#endif
  }

  struct alignas(64) Share {
    std::atomic<long> next{0};
    long end = 0;
  };

  // Only while nobody is at work.
  void share_out(long count, int num_threads) {
    if (room_ < num_threads) shares_.reset(new Share[room_ = num_threads]);
    num_shares_ = num_threads;
    const long num_parts = (count + grain_ - 1) / grain_;
    for (int i = 0; i < num_threads; i++) {
      shares_[i].next.store(num_parts * i / num_threads * grain_, std::memory_order_relaxed);
      shares_[i].end = std::min(num_parts * (i + 1) / num_threads * grain_, count);
    }
  }

  // The own share, then what is left of the others'.
  void work(int own) {
    for (int i = 0; i < num_shares_; i++) {
      Share& share = shares_[(own + i) % num_shares_];
      for (long begin; (begin = share.next.fetch_add(grain_)) < share.end;)
        call_(body_, begin, std::min(begin + grain_, share.end));
    }
  }

  bool start_worker() {
    try {
      std::thread([this, seen = state_.load() >> 32] { serve(seen); }).detach();
    } catch (const std::system_error&) {  // a limit of processes or of memory
      return false;
    }
    num_workers_++;
    return true;
  }

  void serve(uint64_t seen) {
    auto yielded = std::chrono::steady_clock::now();
    for (;;) {
      uint64_t state = wait_for_job(seen);
      seen = state >> 32;
      if (is_in_the_way() && !made_way()) {
        std::this_thread::sleep_for(REST);  // not `wake_`: the next op would bring it back
        continue;
      }
      while (state >> 32 == seen && (state & OPEN) && (state & HELPERS) < max_helpers_)
        if (state_.compare_exchange_weak(state, state + 1)) {
          work(int(state & HELPERS) + 1);
          state_.fetch_sub(1, std::memory_order_release);
          if (std::chrono::steady_clock::now() - yielded > TURN) {
            // Whoever waits for this core gets it now, and not within a part that is waited for.
            std::this_thread::yield();
            yielded = std::chrono::steady_clock::now();
          }
          break;
        }
    }
  }

  // Returns the state once it is another job's than `seen`, or this helper is in the way.
  uint64_t wait_for_job(uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + PATIENCE;
    for (long spins = 1;; spins++) {
      const uint64_t state = state_.load(std::memory_order_acquire);
      if (state >> 32 != seen) return state;
      pause(1);
      if (spins % 32) continue;
      if (is_in_the_way()) return state;
      if (std::chrono::steady_clock::now() > end) {
        std::unique_lock<std::mutex> guard(sleep_);
        num_asleep_++;
        wake_.wait(guard, [&] { return state_.load() >> 32 != seen; });
        num_asleep_--;
      }
    }
  }

  std::mutex one_job_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> num_asleep_{0}, callers_core_{-1}, caller_{0};
  std::atomic<uint64_t> max_helpers_{0};
  void (*call_)(const void*, long, long) = nullptr;
  const void* body_ = nullptr;
  long grain_ = 1;
  std::unique_ptr<Share[]> shares_;
  int room_ = 0, num_shares_ = 0, num_workers_ = 0;
};
